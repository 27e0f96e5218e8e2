//! Counts that others published, or that their files hold.

use flowhn_split::*;

fn released_block(d_model: usize, d_ff: usize, n_heads: usize, n_kv_heads: usize) -> BlockShape {
    BlockShape {
        d_model,
        attn: AttnShape { n_heads, n_kv_heads, d_head: d_model / n_heads, bridge: Bridge::None },
        ssm: SsmShape::Mamba1 {
            d_inner: 2 * d_model,
            d_state: 16,
            d_conv: 4,
            dt_rank: d_model.div_ceil(16),
            inner_norms: true,
        },
        mlp: MlpShape { d_ff },
        form: BlockForm::Released,
        options: BlockOptions::default(),
    }
}

fn parameters(vocab_size: usize, policy: &str, n_layers: usize, block: BlockShape) -> u64 {
    let blocks = vec![block; n_layers];
    let settings = vec![SplitSettings::new(policy.parse().unwrap()); n_layers];
    let routing = Routing::new(1024, &settings, &blocks).unwrap();
    let model = ModelShape { vocab_size, d_model: block.d_model, tie_embeddings: false, blocks };
    PlanReport::new(&model, &routing, 1024, Element::Fp32).unwrap().parameters
}

/// The weights in the golden files of the released script: 3 blocks, modes A to D.
#[test]
fn golden_files_hold_as_many_weights() {
    let block = released_block(64, 96, 4, 2);
    assert_eq!(parameters(97, "no_split", 3, block), 295_788);
    for policy in ["ae_split", "fa_split", "fac_split"] {
        assert_eq!(parameters(97, policy, 3, block), 283_500, "{policy}");
    }
}

/// The names of the paper's sizes, to a tenth.
#[test]
fn the_papers_sizes() {
    for (d_model, d_ff, n_layers, want) in [(768, 2048, 2, 135e6), (1024, 4096, 6, 355e6), (2048, 8192, 6, 1.1e9)] {
        let block = released_block(d_model, d_ff, 32, 8);
        let got = parameters(65536, "fac_split", n_layers, block) as f64;
        assert!((got / want - 1.0).abs() < 0.1, "{d_model}: {got}");
    }
}
