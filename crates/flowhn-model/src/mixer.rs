//! From the sizes of a configuration to those that the mixers' crates take.

use flowhn_attn::{AttnConfig, Bridge};
use flowhn_split::SsmShape;
use flowhn_ssm::{GateNorm, GroupOrder, Mamba1Config, Mamba2Config, SsmConfig};

use crate::{ModelConfig, config};

/// The attention mixer of a block.
pub(crate) fn attn(config: &ModelConfig, block_idx: usize) -> AttnConfig {
    let options = config.block_shape(block_idx).options;
    AttnConfig {
        d_model: config.d_model as i64,
        n_heads: config.attn.n_heads as i64,
        n_kv_heads: config.attn.n_kv_heads as i64,
        d_head: config.attn.d_head as i64,
        rope: config.rope,
        bridge: match config.attn.bridge {
            flowhn_split::Bridge::None => Bridge::None,
            flowhn_split::Bridge::Kv => Bridge::Kv,
        },
        window: options.window,
        n_sinks: options.n_meta,
        bias: options.attn_bias,
        out_norm_eps: options.mixer_norms.then_some(config.rms_norm_eps),
    }
}

/// The state-space mixer.
pub(crate) fn ssm(config: &ModelConfig) -> SsmConfig {
    let (d_model, options) = (config.d_model as i64, config.options);
    match config.ssm {
        SsmShape::Mamba1 { d_inner, d_state, d_conv, dt_rank, inner_norms } => SsmConfig::Mamba1(Mamba1Config {
            d_model,
            d_inner: d_inner as i64,
            d_state: d_state as i64,
            d_conv: d_conv as i64,
            dt_rank: dt_rank as i64,
            inner_norm_eps: inner_norms.then_some(config.rms_norm_eps),
            conv_bias: options.conv_bias,
            proj_bias: options.ssm_bias,
            out_norm_eps: options.mixer_norms.then_some(config.rms_norm_eps),
        }),
        SsmShape::Mamba2 { d_inner, d_state, d_conv, d_head, n_groups } => SsmConfig::Mamba2(Mamba2Config {
            d_model,
            n_heads: (d_inner / d_head) as i64,
            d_head: d_head as i64,
            d_state: d_state as i64,
            n_groups: n_groups as i64,
            d_conv: d_conv as i64,
            chunk_len: config.ssd_chunk_len,
            gate_norm: match options.gate_norm {
                flowhn_split::GateNorm::AfterGate => GateNorm::AfterGate,
                flowhn_split::GateNorm::BeforeGate => GateNorm::BeforeGate,
                flowhn_split::GateNorm::None => GateNorm::None,
            },
            norm_groups: config.norm_groups as i64,
            norm_eps: config.rms_norm_eps,
            conv_bias: options.conv_bias,
            in_bias: options.ssm_bias,
            out_bias: options.ssm_out_bias,
            group_order: match config.group_order {
                config::GroupOrder::Contiguous => GroupOrder::Contiguous,
                config::GroupOrder::Strided => GroupOrder::Strided,
            },
        }),
    }
}
