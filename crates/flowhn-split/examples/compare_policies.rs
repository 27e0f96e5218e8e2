//! Prints the split and the cost of the released 135M shapes under every policy.
//!
//! `cargo run -p flowhn-split --example compare_policies [SEQ_LEN]`

use flowhn_split::*;

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let seq_len = std::env::args().nth(1).map_or(Ok(1024), |arg| arg.parse())?;
    let block = BlockShape {
        d_model: 768,
        attn: AttnShape { n_heads: 32, n_kv_heads: 8, d_head: 24, bridge: Bridge::None },
        ssm: SsmShape::Mamba1 { d_inner: 1536, d_state: 16, d_conv: 4, dt_rank: 48, inner_norms: true },
        mlp: MlpShape { d_ff: 2048 },
        form: BlockForm::Released,
        options: BlockOptions::default(),
    };
    let model = ModelShape { vocab_size: 65536, d_model: 768, tie_embeddings: false, blocks: vec![block; 2] };
    for policy in Policy::all() {
        println!("{policy}: {}", policy.summary());
        let routing = Routing::new(1024, &vec![SplitSettings::new(policy); 2], &model.blocks)?;
        println!("{}", PlanReport::new(&model, &routing, seq_len, Element::Bf16)?);
    }
    Ok(())
}
