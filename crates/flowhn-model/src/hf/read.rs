//! From a `config.json` to a configuration of ours.

use serde_json::json;
use toml::Table;

use super::falcon_h1;
use super::keys::Keys;
use crate::config::{GroupOrder, ModelConfig, RawModel, from_table};
use crate::names::{Family, Fold};
use crate::{Error, Result};

/// A model of `transformers` as one of ours.
#[derive(Clone, Debug)]
pub struct HfModel {
    /// Whose names its weights have.
    pub family: Family,
    /// The same model as a configuration of ours.
    pub config: ModelConfig,
    /// The family's multipliers, which ours does not have, as factors of its weights: for [`Family::load`].
    pub fold: Fold,
    /// Keys of the file that neither we nor, as far as we know, the result depends on.
    pub ignored: Vec<String>,
}

/// Reads the text of a `config.json`; the model is planned for sequences of `seq_len` tokens.
///
/// ```
/// use flowhn_model::{Family, hf};
/// let text = r#"{"model_type": "mamba", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2,
///                "state_size": 8, "tie_word_embeddings": true, "conv_kernel": 4, "expand": 2}"#;
/// let model = hf::read_config(text, 128)?;
/// assert_eq!((model.family, model.config.ssm.d_inner()), (Family::Mamba, 64));
/// assert!(hf::read_config(r#"{"model_type": "gpt2"}"#, 128).is_err());
/// # Ok::<(), flowhn_model::Error>(())
/// ```
///
/// # Errors
/// [`Error::Input`] for a family or a value that we do not compute, naming it.
pub fn read_config(text: &str, seq_len: usize) -> Result<HfModel> {
    let keys = Keys::parse(text)?;
    let mut fold = Fold::default();
    let (family, section) = match keys.text("model_type") {
        Some("llama") => (Family::Llama, llama(&keys)?),
        Some("mamba") => (Family::Mamba, mamba(&keys)?),
        Some("mamba2") => (Family::Mamba2, mamba2(&keys)?),
        Some("jamba") => (Family::Jamba, jamba(&keys)?),
        Some("falcon_h1") => {
            let (section, factors) = falcon_h1::read(&keys)?;
            fold = factors;
            (Family::FalconH1, section)
        }
        other => {
            let found = other.map_or_else(|| "has no `model_type`".to_owned(), |name| format!("is for `{name}`"));
            return Err(Error::Input(format!(
                "the configuration {found}; supported are llama, mamba, mamba2, jamba and falcon_h1"
            )));
        }
    };
    keys.only("hidden_act", &[json!("silu"), json!("swish")])?;
    let text = format!("{section}[split]\npolicy = {}\n", policies(&keys, family)?);
    let mut table: Table = text.parse().map_err(|error: toml::de::Error| Error::Input(error.to_string()))?;
    table.insert("seq_len".to_owned(), (seq_len as i64).into());
    let config = ModelConfig::check(from_table::<RawModel>(table)?)?;
    Ok(HfModel { family, config, fold, ignored: keys.left_over() })
}

/// The longest sequence that a `config.json` speaks of (`max_position_embeddings`), where it does.
///
/// # Errors
/// [`Error::Input`] where the text is no configuration or the value no size.
pub fn max_position(text: &str) -> Result<Option<usize>> {
    Keys::parse(text)?.maybe_size("max_position_embeddings")
}

fn llama(keys: &Keys) -> Result<String> {
    let n_heads = keys.size("num_attention_heads")?;
    let d_model = keys.size("hidden_size")?;
    keys.only("attention_dropout", &[json!(0), json!(0.0)])?;
    Ok(format!(
        "{}d_ff = {}\nmlp_bias = {}\n{}\
         [attn]\nn_heads = {n_heads}\nn_kv_heads = {}\nd_head = {}\nbias = {}\n{}",
        outer(keys, "rms_norm_eps", 1e-6, false)?,
        keys.size("intermediate_size")?,
        keys.flag_or("mlp_bias", false)?,
        padding(keys.maybe_size("pad_token_id")?),
        keys.size_or("num_key_value_heads", n_heads)?,
        keys.size_or("head_dim", d_model / n_heads.max(1))?,
        keys.flag_or("attention_bias", false)?,
        rope(keys, 10_000.)?,
    ))
}

fn mamba(keys: &Keys) -> Result<String> {
    let d_model = keys.size("hidden_size")?;
    let d_inner = expanded(keys, "expand", d_model)?;
    ignore_mamba_init(keys);
    Ok(format!(
        "{}d_ff = 0\n[ssm]\nmixer = \"mamba1\"\nd_inner = {}\nd_state = {}\nd_conv = {}\ndt_rank = {}\n\
         inner_norms = false\nconv_bias = {}\nproj_bias = {}\n",
        outer(keys, "layer_norm_epsilon", 1e-5, true)?,
        keys.size_or("intermediate_size", d_inner)?,
        keys.size_or("state_size", 16)?,
        keys.size_or("conv_kernel", 4)?,
        keys.size_or_auto("time_step_rank", d_model.div_ceil(16))?,
        keys.flag_or("use_conv_bias", true)?,
        keys.flag_or("use_bias", false)?,
    ))
}

fn mamba2(keys: &Keys) -> Result<String> {
    let d_model = keys.size("hidden_size")?;
    let d_inner = expanded(keys, "expand", d_model)?;
    let (n_heads, d_head) = (keys.size_or("num_heads", 128)?, keys.size_or("head_dim", 64)?);
    if n_heads * d_head != d_inner {
        return Err(Error::Input(format!(
            "`num_heads` times `head_dim` is {}, but `expand` times `hidden_size` is {d_inner}: the two must be equal",
            n_heads * d_head
        )));
    }
    keys.only("time_step_limit", &[json!([0.0, null]), json!([0, null]), json!([0.0, {"__float__": "Infinity"}])])?;
    // The mixer normalises whatever this says.
    keys.ignore(&["rms_norm", "norm_before_gate", "time_step_rank"]);
    ignore_mamba_init(keys);
    Ok(format!(
        "{}d_ff = 0\n[ssm]\nmixer = \"mamba2\"\nd_inner = {d_inner}\nd_state = {}\nd_conv = {}\nd_head = {d_head}\n\
         n_groups = {}\nchunk_len = {}\ngroup_order = \"{}\"\nconv_bias = {}\nproj_bias = {}\n",
        outer(keys, "layer_norm_epsilon", 1e-5, false)?,
        keys.size_or("state_size", 128)?,
        keys.size_or("conv_kernel", 4)?,
        keys.size_or("n_groups", 8)?,
        keys.size_or("chunk_size", 256)?,
        match group_order(keys) {
            GroupOrder::Contiguous => "contiguous",
            GroupOrder::Strided => "strided",
        },
        keys.flag_or("use_conv_bias", true)?,
        keys.flag_or("use_bias", false)?,
    ))
}

fn jamba(keys: &Keys) -> Result<String> {
    let d_model = keys.size("hidden_size")?;
    let n_heads = keys.size("num_attention_heads")?;
    let n_layers = keys.size("num_hidden_layers")?;
    let (n_experts, period) = (keys.size_or("num_experts", 16)?, keys.size_or("expert_layer_period", 2)?);
    let offset = keys.size_or("expert_layer_offset", 1)?;
    if n_experts > 1 && (0..n_layers).any(|idx| idx % period.max(1) == offset) {
        return Err(Error::Input(format!(
            "`num_experts` is {n_experts}: layers of experts are not supported, only models whose MLPs are dense"
        )));
    }
    if !d_model.is_multiple_of(n_heads.max(1)) {
        return Err(Error::Input(format!("`num_attention_heads` {n_heads} does not divide `hidden_size` {d_model}")));
    }
    keys.only("sliding_window", &[])?;
    keys.only("attention_dropout", &[json!(0), json!(0.0)])?;
    keys.ignore(&["num_experts_per_tok", "router_aux_loss_coef", "output_router_logits", "num_logits_to_keep"]);
    keys.ignore(&["use_mamba_kernels"]);
    Ok(format!(
        "{}d_ff = {}\n{}[attn]\nn_heads = {n_heads}\nn_kv_heads = {}\nrope = false\n\
         [ssm]\nmixer = \"mamba1\"\nd_inner = {}\nd_state = {}\nd_conv = {}\ndt_rank = {}\ninner_norms = true\n\
         conv_bias = {}\nproj_bias = {}\n",
        outer(keys, "rms_norm_eps", 1e-6, false)?,
        keys.size("intermediate_size")?,
        padding_or_0(keys)?,
        keys.size_or("num_key_value_heads", n_heads)?,
        expanded(keys, "mamba_expand", d_model)?,
        keys.size_or("mamba_d_state", 16)?,
        keys.size_or("mamba_d_conv", 4)?,
        keys.size_or_auto("mamba_dt_rank", d_model.div_ceil(16))?,
        keys.flag_or("mamba_conv_bias", true)?,
        keys.flag_or("mamba_proj_bias", false)?,
    ))
}

/// What every family has at the top of `[model]`.
pub(super) fn outer(keys: &Keys, eps_key: &str, eps: f64, tied: bool) -> Result<String> {
    Ok(format!(
        "block = \"flow\"\nvocab_size = {}\nd_model = {}\nn_layers = {}\nrms_norm_eps = {:e}\ntie_embeddings = {}\n",
        keys.size("vocab_size")?,
        keys.size("hidden_size")?,
        keys.size("num_hidden_layers")?,
        keys.number_or(eps_key, eps)?,
        keys.flag_or("tie_word_embeddings", tied)?,
    ))
}

fn padding(idx: Option<usize>) -> String {
    idx.map_or_else(String::new, |idx| format!("padding_idx = {idx}\n"))
}

/// The padding of a family whose token for it is 0 unless it says otherwise, even by null.
pub(super) fn padding_or_0(keys: &Keys) -> Result<String> {
    Ok(padding(if keys.has("pad_token_id") { keys.maybe_size("pad_token_id")? } else { Some(0) }))
}

/// Rotary positions, as lines of the attention's section. What scales them is in `rope_scaling`; transformers 5 writes that and the base one
/// level down.
pub(super) fn rope(keys: &Keys, default: f64) -> Result<String> {
    let mut theta = keys.number_or("rope_theta", default)?;
    let mut scaling = String::new();
    for (key, has_theta) in [("rope_scaling", false), ("rope_parameters", true)] {
        let Some(inner) = keys.inner(key)? else { continue };
        if has_theta {
            theta = inner.number_or("rope_theta", theta)?;
        }
        let found = rope_scaling(&inner).map_err(|error| match error {
            Error::Input(message) => Error::Input(format!("`{key}`: {message}")),
            other => other,
        })?;
        if let Some(found) = found {
            scaling = format!("rope_scaling = {found}\n");
        }
        if let [first, ..] = &inner.left_over()[..] {
            return Err(Error::Input(format!("`{key}` has {first}, which is not supported")));
        }
    }
    Ok(format!("rope = true\nrope_theta = {theta:e}\n{scaling}"))
}

/// What scales rotary positions, as TOML.
fn rope_scaling(keys: &Keys) -> Result<Option<String>> {
    let kind = keys.text("rope_type").or_else(|| keys.text("type")).unwrap_or("default").to_owned();
    // Older files have the type twice.
    keys.ignore(&["rope_type", "type"]);
    let factor = || keys.number("factor");
    match kind.as_str() {
        "default" => Ok(None),
        "linear" => Ok(Some(format!("{{ type = \"linear\", factor = {:e} }}", factor()?))),
        "llama3" => Ok(Some(format!(
            "{{ type = \"llama3\", factor = {:e}, low_freq_factor = {:e}, high_freq_factor = {:e}, original_seq_len = {} }}",
            factor()?,
            keys.number("low_freq_factor")?,
            keys.number("high_freq_factor")?,
            keys.size("original_max_position_embeddings")?,
        ))),
        _ => {
            Err(Error::Input(format!("`rope_type` is {kind:?}, supported are \"default\", \"linear\" and \"llama3\"")))
        }
    }
}

/// `hidden_size` times a factor that need not be whole, cut to a whole number.
pub(super) fn expanded(keys: &Keys, key: &str, d_model: usize) -> Result<usize> {
    Ok((keys.number_or(key, 2.)? * d_model as f64) as usize)
}

/// What says how weights start, and in which type sums are taken: f32 for all of ours.
fn ignore_mamba_init(keys: &Keys) {
    keys.ignore(&["time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme", "time_step_floor"]);
    keys.ignore(&["rescale_prenorm_residual", "residual_in_fp32", "use_mambapy", "pad_token_id"]);
}

/// How the transformers that wrote the file deals out groups: until 4.52 (pull request 37533) its plain path gives head `h` group
/// `h % n_groups`; its CUDA path, later versions and `mamba_ssm` let neighbours share.
fn group_order(keys: &Keys) -> GroupOrder {
    let version = keys.text("transformers_version").unwrap_or_default();
    let mut parts = version.split('.').map(|part| part.parse::<u32>().ok());
    match (parts.next().flatten(), parts.next().flatten()) {
        (Some(4), Some(minor)) if minor < 52 => GroupOrder::Strided,
        _ => GroupOrder::Contiguous,
    }
}

/// The policies of the blocks, as TOML.
fn policies(keys: &Keys, family: Family) -> Result<String> {
    match family {
        Family::Jamba => {}
        Family::Llama => return Ok("\"attn_all\"".to_owned()),
        Family::FalconH1 => return Ok("\"no_split\"".to_owned()),
        Family::Released | Family::Mamba | Family::Mamba2 => return Ok("\"ssm_all\"".to_owned()),
    }
    let (period, offset) = (keys.size_or("attn_layer_period", 8)?, keys.size_or("attn_layer_offset", 4)?);
    if offset >= period {
        return Err(Error::Input(format!("`attn_layer_offset` {offset} is not below `attn_layer_period` {period}")));
    }
    let policy = |idx: usize| if idx % period == offset { "\"attn_all\"" } else { "\"ssm_all\"" };
    let list: Vec<&str> = (0..keys.size("num_hidden_layers")?).map(policy).collect();
    Ok(format!("[{}]", list.join(", ")))
}
