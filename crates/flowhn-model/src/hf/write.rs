//! From a configuration of ours to a `config.json`, where there is one for it.

use flowhn_attn::{Rope, RopeScaling};
use flowhn_split::{Bridge, GateNorm, Policy, Sharing, SsmShape, policy_per_block};
use serde_json::{Map, Value, json};

use super::falcon_h1;
use crate::config::{BlockKind, GroupOrder, ModelConfig};
use crate::names::Family;
use crate::{Error, Result};

/// The family of `transformers` that a configuration is a member of, and its `config.json`.
///
/// ```
/// use flowhn_model::{Family, hf};
/// let text = r#"{"model_type": "mamba", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}"#;
/// let config = hf::read_config(text, 128)?.config;
/// let (family, json) = hf::write_config(&config)?;
/// assert_eq!(family, Family::Mamba);
/// assert_eq!(hf::read_config(&json.to_string(), 128)?.config, config);
/// # Ok::<(), flowhn_model::Error>(())
/// ```
///
/// # Errors
/// [`Error::Input`] that says what no family has.
pub fn write_config(config: &ModelConfig) -> Result<(Family, Value)> {
    let policies = policy_per_block(&config.first_blocks, &config.policy, config.n_layers)?;
    let (family, mut json) = members(config, &policies)?;
    let object = json.as_object_mut().ok_or_else(|| Error::Input("config.json is no object".to_owned()))?;
    add_outer(object, config);
    Ok((family, json))
}

/// What to know before a configuration that was written for this family is used, each a sentence.
pub fn warnings(family: Family, config: &ModelConfig) -> Vec<String> {
    let mut warnings = Vec::new();
    if family == Family::Mamba2
        && let SsmShape::Mamba2 { d_inner, d_head, n_groups, .. } = config.ssm
        && n_groups > 1
        && n_groups < d_inner / d_head.max(1)
    {
        let versions = match config.group_order {
            GroupOrder::Contiguous => "since 4.52, or with its CUDA kernels,",
            GroupOrder::Strided => "before 4.52 and without its CUDA kernels",
        };
        warnings.push(format!(
            "{n_groups} groups are dealt out as transformers {versions} does; elsewhere the same weights give other logits"
        ));
    }
    warnings
}

fn members(config: &ModelConfig, policies: &[Policy]) -> Result<(Family, Value)> {
    let options = &config.options;
    let all = |sharing| policies.iter().all(|policy| policy.sharing() == sharing);
    let refuse = |what: &str| Err(Error::Input(format!("no model of transformers that we export has {what}")));
    if config.block == BlockKind::Released {
        return refuse("the released FlowHN block (model.block = \"released\")");
    }
    let has_both = |policy: &&Policy| matches!(policy.sharing(), Sharing::Parallel | Sharing::Split);
    if let Some(policy) = policies.iter().find(has_both).filter(|_| !all(Sharing::Parallel)) {
        return refuse(&format!("blocks like this one (policy {policy}), or not in every layer"));
    }
    for (there, what) in [
        (options.n_meta > 0, "learned tokens in front (model.n_meta)"),
        (options.window.is_some(), "this sliding window (model.attn.window)"),
        (options.mixer_norms && !all_mamba2(config, &all), "norms inside its mixers (model.mixer_norms)"),
        (config.attn.bridge == Bridge::Kv, "a bridge (model.attn.bridge)"),
    ] {
        if there {
            return refuse(what);
        }
    }
    if all(Sharing::Parallel) {
        return falcon_h1::write(config).map(|json| (Family::FalconH1, json));
    }
    if let Some(rope) = config.rope.filter(|_| all(Sharing::AttnOnly)) {
        return match config.d_ff {
            0 => refuse("attention without an MLP (model.d_ff = 0)"),
            _ => Ok((Family::Llama, llama(config, rope))),
        };
    }
    if options.mlp_bias || (options.attn_bias && !all(Sharing::SsmOnly)) {
        return refuse("biases in attention or MLP beside state-space layers or without rotary positions");
    }
    match config.ssm {
        SsmShape::Mamba1 { inner_norms: false, .. } if all(Sharing::SsmOnly) && config.d_ff == 0 => {
            no_padding(config, "Mamba").map(|()| (Family::Mamba, mamba(config)))
        }
        SsmShape::Mamba2 { .. } if all(Sharing::SsmOnly) && config.d_ff == 0 => {
            if options.gate_norm != GateNorm::AfterGate || config.norm_groups != 1 {
                return refuse("Mamba-2 alone with another norm (model.ssm.gate_norm, model.ssm.norm_groups)");
            }
            if options.ssm_bias != options.ssm_out_bias {
                return refuse("a bias in one projection of Mamba-2 (model.ssm.proj_bias, model.ssm.out_proj_bias)");
            }
            no_padding(config, "Mamba-2").map(|()| (Family::Mamba2, mamba2(config)))
        }
        SsmShape::Mamba1 { inner_norms, .. } if config.d_ff > 0 && config.rope.is_none() => {
            if !inner_norms && !all(Sharing::AttnOnly) {
                return refuse("Mamba with an MLP and without inner norms (model.ssm.inner_norms = false)");
            }
            Ok((Family::Jamba, jamba(config, policies)?))
        }
        _ => refuse(
            "this mixture: attention layers need rotary positions or, in Jamba, none at all; Mamba-2 layers go without MLP; Mamba-1 \
             layers go without MLP and inner norms, or with both",
        ),
    }
}

/// Mamba-2's own norm is there whatever the option says.
fn all_mamba2(config: &ModelConfig, all: &impl Fn(Sharing) -> bool) -> bool {
    matches!(config.ssm, SsmShape::Mamba2 { .. }) && all(Sharing::SsmOnly)
}

fn no_padding(config: &ModelConfig, family: &str) -> Result<()> {
    match config.padding_idx {
        None => Ok(()),
        Some(idx) => Err(Error::Input(format!(
            "{family} models of transformers train every row of the embedding, this one not row {idx} (model.padding_idx)"
        ))),
    }
}

fn add_outer(object: &mut Map<String, Value>, config: &ModelConfig) {
    for (key, value) in [
        ("vocab_size", json!(config.vocab_size)),
        ("hidden_size", json!(config.d_model)),
        ("num_hidden_layers", json!(config.n_layers)),
        ("hidden_act", json!("silu")),
        ("tie_word_embeddings", json!(config.tie_embeddings)),
        ("torch_dtype", json!("float32")),
    ] {
        object.insert(key.to_owned(), value);
    }
}

/// What scales rotary positions, in the words of transformers; null where nothing does.
pub(super) fn rope_scaling(rope: Rope) -> Value {
    match rope.scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_len } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_len,
        }),
    }
}

fn llama(config: &ModelConfig, rope: Rope) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": config.d_ff,
        "num_attention_heads": config.attn.n_heads,
        "num_key_value_heads": config.attn.n_kv_heads,
        "head_dim": config.attn.d_head,
        "attention_bias": config.options.attn_bias,
        "attention_dropout": 0.0,
        "mlp_bias": config.options.mlp_bias,
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": rope_scaling(rope),
        "pad_token_id": config.padding_idx,
    })
}

fn mamba(config: &ModelConfig) -> Value {
    let SsmShape::Mamba1 { d_inner, d_state, d_conv, dt_rank, .. } = config.ssm else { return Value::Null };
    json!({
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "expand": ratio(d_inner, config.d_model),
        "intermediate_size": d_inner,
        "state_size": d_state,
        "conv_kernel": d_conv,
        "time_step_rank": dt_rank,
        "layer_norm_epsilon": config.rms_norm_eps,
        "use_bias": config.options.ssm_bias,
        "use_conv_bias": config.options.conv_bias,
    })
}

fn mamba2(config: &ModelConfig) -> Value {
    let SsmShape::Mamba2 { d_inner, d_state, d_conv, d_head, n_groups } = config.ssm else { return Value::Null };
    let mut json = json!({
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "expand": ratio(d_inner, config.d_model),
        "num_heads": d_inner / d_head.max(1),
        "head_dim": d_head,
        "state_size": d_state,
        "conv_kernel": d_conv,
        "n_groups": n_groups,
        "chunk_size": config.ssd_chunk_len,
        "layer_norm_epsilon": config.rms_norm_eps,
        "use_bias": config.options.ssm_bias,
        "use_conv_bias": config.options.conv_bias,
    });
    // What the versions make of several groups differs; reading goes by the version.
    json["transformers_version"] = match config.group_order {
        GroupOrder::Strided => "4.49.0".into(),
        GroupOrder::Contiguous => "4.52.0".into(),
    };
    json
}

fn jamba(config: &ModelConfig, policies: &[Policy]) -> Result<Value> {
    let SsmShape::Mamba1 { d_inner, d_state, d_conv, dt_rank, .. } = config.ssm else { return Ok(Value::Null) };
    let (attn, options) = (config.attn, &config.options);
    let expand = d_inner / config.d_model;
    if attn.d_q() != config.d_model || expand * config.d_model != d_inner {
        return Err(Error::Input(format!(
            "Jamba's heads together are as wide as the model and its scan a whole number of times that: {} and {d_inner} do not fit \
             model.d_model = {}",
            attn.d_q(),
            config.d_model
        )));
    }
    let (period, offset) = period_of(policies)?;
    Ok(json!({
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "intermediate_size": config.d_ff,
        "num_attention_heads": attn.n_heads,
        "num_key_value_heads": attn.n_kv_heads,
        "attn_layer_period": period,
        "attn_layer_offset": offset,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": d_state,
        "mamba_d_conv": d_conv,
        "mamba_expand": expand,
        "mamba_dt_rank": dt_rank,
        "mamba_conv_bias": options.conv_bias,
        "mamba_proj_bias": options.ssm_bias,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.seq_len,
        "sliding_window": null,
        "attention_dropout": 0.0,
        "use_mamba_kernels": false,
        "pad_token_id": config.padding_idx,
    }))
}

/// The period and offset whose layers are those with attention.
fn period_of(policies: &[Policy]) -> Result<(usize, usize)> {
    let is_attn: Vec<bool> = policies.iter().map(|policy| policy.sharing() == Sharing::AttnOnly).collect();
    let n = is_attn.len();
    (1..=n + 1)
        .flat_map(|period| (0..period).map(move |offset| (period, offset)))
        .find(|&(period, offset)| is_attn.iter().enumerate().all(|(i, &attn)| attn == (i % period == offset)))
        .ok_or_else(|| {
            let places: Vec<usize> = (0..n).filter(|&i| is_attn[i]).collect();
            Error::Input(format!("Jamba's attention layers follow at one distance; those of this model are {places:?}"))
        })
}

/// A factor whose product with `of`, cut to a whole number, is `whole`.
pub(super) fn ratio(whole: usize, of: usize) -> Value {
    if whole.is_multiple_of(of) {
        return json!(whole / of);
    }
    let factor = whole as f64 / of as f64;
    // Division may round down by a unit in the last place, and then the product would be cut to one less.
    json!(if (factor * of as f64) as usize == whole { factor } else { factor.next_up() })
}

#[cfg(test)]
mod tests {
    use super::super::read_config;
    use super::*;
    use crate::config::{RawModel, from_table};

    fn config(text: &str) -> ModelConfig {
        let text = format!("vocab_size = 50\nd_model = 24\nseq_len = 16\n{text}");
        ModelConfig::check(from_table::<RawModel>(text.parse().unwrap()).unwrap()).unwrap()
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        for (text, family) in [
            (
                "d_ff = 40\nn_layers = 2\nmlp_bias = true\npadding_idx = 3\n[attn]\nn_heads = 3\nn_kv_heads = 1\nd_head = 10\n\
                 rope = true\nrope_theta = 500.0\nbias = true\n[split]\npolicy = \"attn_all\"",
                Family::Llama,
            ),
            (
                "d_ff = 0\nn_layers = 2\ntie_embeddings = true\n[ssm]\nd_inner = 37\ndt_rank = 5\nd_conv = 3\ninner_norms = false\n\
                 proj_bias = true\nconv_bias = false\n[split]\npolicy = \"ssm_all\"",
                Family::Mamba,
            ),
            (
                "d_ff = 0\nn_layers = 2\n[ssm]\nmixer = \"mamba2\"\nd_inner = 40\nd_head = 10\nn_groups = 2\n\
                 group_order = \"strided\"\n[split]\npolicy = \"ssm_all\"",
                Family::Mamba2,
            ),
            (
                "d_ff = 40\nn_layers = 5\n[attn]\nn_heads = 4\n[ssm]\nd_inner = 72\n\
                 [split]\npolicy = [\"ssm_all\", \"attn_all\", \"ssm_all\", \"ssm_all\", \"attn_all\"]",
                Family::Jamba,
            ),
        ] {
            let config = config(text);
            let (found, json) = write_config(&config).unwrap();
            assert_eq!(found, family);
            let back = read_config(&json.to_string(), 16).unwrap();
            assert_eq!((back.family, &back.ignored), (family, &Vec::new()), "{json}");
            // A mixer that no block has is not in the file, and a list of equal policies is one.
            assert_eq!(back.config.shape().outer_params(), config.shape().outer_params());
            assert_eq!(write_config(&back.config).unwrap(), (family, json));
        }
    }

    #[test]
    fn what_no_family_has_is_named() {
        for (text, want) in [
            ("d_ff = 40\nn_layers = 1\n[attn]\nn_heads = 4\n[split]\npolicy = \"ae_split\"", "policy ae_split"),
            (
                "d_ff = 0\nn_layers = 1\n[ssm]\nmixer = \"mamba2\"\nd_head = 12\ngate_norm = \"before_gate\"\n\
                 [split]\npolicy = \"ssm_all\"",
                "model.ssm.gate_norm",
            ),
            (
                "d_ff = 0\nn_layers = 1\n[ssm]\nmixer = \"mamba2\"\nd_head = 12\nout_proj_bias = true\n\
                 [split]\npolicy = \"ssm_all\"",
                "model.ssm.out_proj_bias",
            ),
            ("d_ff = 0\nn_layers = 1\n[ssm]\ninner_norms = true\n[split]\npolicy = \"ssm_all\"", "this mixture"),
            (
                "d_ff = 4\nn_layers = 4\n[attn]\nn_heads = 4\n\
                 [split]\npolicy = [\"attn_all\", \"attn_all\", \"ssm_all\", \"ssm_all\"]",
                "those of this model are [0, 1]",
            ),
            (
                "d_ff = 4\nn_layers = 1\n[attn]\nn_heads = 4\nwindow = 3\nrope = true\n[split]\npolicy = \"attn_all\"",
                "model.attn.window",
            ),
            (
                "d_ff = 4\nn_layers = 1\nblock = \"released\"\n[attn]\nn_heads = 4\n[split]\npolicy = \"no_split\"",
                "released FlowHN block",
            ),
        ] {
            let error = write_config(&config(text)).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn ratios_survive_the_cut() {
        for of in 1..200 {
            for whole in 1..400 {
                let factor = ratio(whole, of).as_f64().unwrap();
                assert_eq!((factor * of as f64) as usize, whole, "{whole} / {of}");
            }
        }
    }
}
