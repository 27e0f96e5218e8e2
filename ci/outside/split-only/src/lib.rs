//! Plans a hybrid model and counts its FLOPs with `flowhn-split` alone.

#![forbid(unsafe_code)]

use flowhn_split::{
    AttnShape, BlockForm, BlockOptions, BlockShape, Bridge, Error, MlpShape, ModelFlops, ModelShape, Routing,
    ScoreCount, SplitSettings, SsmShape,
};

/// Forward FLOPs of one token in a hybrid of two blocks of 768 features, trained at `seq_len`.
///
/// # Errors
/// An unknown policy, or a length of 0.
pub fn flops_per_token(policy: &str, seq_len: usize) -> Result<u64, Error> {
    let block = BlockShape {
        d_model: 768,
        attn: AttnShape { n_heads: 32, n_kv_heads: 8, d_head: 24, bridge: Bridge::None },
        ssm: SsmShape::Mamba1 { d_inner: 1536, d_state: 16, d_conv: 4, dt_rank: 48, inner_norms: true },
        mlp: MlpShape { d_ff: 2048 },
        form: BlockForm::Released,
        options: BlockOptions::default(),
    };
    let settings = SplitSettings::new(policy.parse()?);
    let routing = Routing::new(seq_len, &[settings.clone(), settings], &[block, block])?;
    let model = ModelShape { vocab_size: 65_536, d_model: 768, tie_embeddings: false, blocks: vec![block, block] };
    let flops = ModelFlops::new(&model, &routing, seq_len, ScoreCount::Causal)?;
    Ok(flops.forward() / seq_len as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitting_saves_most_of_a_branch() {
        let both = flops_per_token("no_split", 1024).expect("a known policy");
        let split = flops_per_token("fac_split", 1024).expect("a known policy");
        assert!(split < both, "{split} < {both}");
    }

    #[test]
    fn errors_name_what_was_wrong() {
        let error = flops_per_token("fax_split", 1024).expect_err("no such policy");
        assert!(error.to_string().contains("fax_split"), "{error}");
        flops_per_token("fac_split", 0).expect_err("no tokens");
    }
}
