//! The released script's names for weights, and how its matrices lie in ours.
//!
//! We merge what reads the same input into one matrix (q, k, v; gate, up), so several released tensors may be rows of one of
//! ours. Names: the state dict of the script published with arXiv 2505.19472.

use std::collections::HashMap;

use tch::Tensor;

use crate::{Error, Model, Result};

/// One released tensor and the rows of our parameter that it is.
#[derive(Clone, Debug, PartialEq)]
pub struct ReleasedName {
    /// Name in the released state dict.
    pub released: String,
    /// Name of our parameter.
    pub ours: String,
    /// First row and number of rows; `None` for the whole parameter.
    pub rows: Option<(i64, i64)>,
}

/// The released names of a model of released blocks, one or more for each of our parameters.
///
/// # Errors
/// [`Error::Input`] for a parameter that the released script does not have.
pub fn released_names(model: &Model) -> Result<Vec<ReleasedName>> {
    let attn = model.config().attn;
    let (d_q, d_kv, d_ff) = (attn.d_q() as i64, attn.d_kv() as i64, model.config().d_ff as i64);
    let mut names = Vec::new();
    for param in model.params() {
        let ours = param.name.as_str();
        let pieces: Vec<(String, Option<(i64, i64)>)> = match layer_part(ours) {
            None => vec![(
                match ours {
                    "embed.weight" => "model.embed_tokens.weight",
                    "norm.weight" => "model.final_layernorm.weight",
                    "lm_head.weight" => "lm_head.weight",
                    _ => return Err(no_released_name(ours)),
                }
                .to_owned(),
                None,
            )],
            Some((layer, part)) => layer_names(part, (d_q, d_kv, d_ff))
                .ok_or_else(|| no_released_name(ours))?
                .into_iter()
                .map(|(name, rows)| (format!("model.layers.{layer}.{name}"), rows))
                .collect(),
        };
        names.extend(pieces.into_iter().map(|(released, rows)| ReleasedName { released, ours: ours.to_owned(), rows }));
    }
    Ok(names)
}

/// Loads a model of released blocks from tensors under their released names.
///
/// # Errors
/// [`Error::Input`] that lists the names that are missing or left over; [`Error::Tensor`] if a shape differs.
pub fn load_released(model: &Model, tensors: &HashMap<String, Tensor>) -> Result<()> {
    let names = released_names(model)?;
    let missing: Vec<&str> =
        names.iter().map(|name| name.released.as_str()).filter(|name| !tensors.contains_key(*name)).collect();
    let mut left_over: Vec<&str> =
        tensors.keys().map(String::as_str).filter(|key| names.iter().all(|name| name.released != *key)).collect();
    left_over.sort_unstable();
    if !missing.is_empty() || !left_over.is_empty() {
        return Err(Error::Input(format!(
            "the weights do not fit the model: missing {missing:?}, left over {left_over:?}"
        )));
    }
    for param in model.params() {
        let pieces: Vec<&Tensor> =
            names.iter().filter(|n| n.ours == param.name).map(|n| &tensors[&n.released]).collect();
        let whole = match pieces.as_slice() {
            [one] => one.shallow_clone(),
            many => Tensor::f_cat(many, 0)?,
        };
        // The script's depthwise convolution has an axis of size 1 that ours does not.
        let whole =
            if param.name.ends_with("conv1d.weight") && whole.dim() == 3 { whole.f_squeeze_dim(1)? } else { whole };
        model.params().assign(&param.name, &whole)?;
    }
    Ok(())
}

/// Splits `layers.3.rest` into the index and the rest.
fn layer_part(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("layers.")?.split_once('.')
}

type Pieces = Vec<(String, Option<(i64, i64)>)>;

fn layer_names(part: &str, (d_q, d_kv, d_ff): (i64, i64, i64)) -> Option<Pieces> {
    if let Some((branch, rest)) = part.split_once('.').filter(|(branch, _)| ["attn", "ssm"].contains(branch)) {
        let theirs = if branch == "attn" { "atten" } else { "mamba" };
        let pieces = branch_names(rest, (d_q, d_kv, d_ff))?;
        return Some(pieces.into_iter().map(|(name, rows)| (format!("{theirs}.{name}"), rows)).collect());
    }
    let name = match part {
        "fusion.branch_proj.weight" => "branch_proj.weight",
        "final_norm.weight" => "pre_ff_layernorm.weight",
        "final_proj.weight" => "final_proj.weight",
        _ => return None,
    };
    Some(vec![(name.to_owned(), None)])
}

fn branch_names(part: &str, (d_q, d_kv, d_ff): (i64, i64, i64)) -> Option<Pieces> {
    let rows = |names: &[(&str, i64)]| {
        let mut start = 0;
        let piece = |&(name, len): &(&str, i64)| {
            start += len;
            (format!("{name}.weight"), Some((start - len, len)))
        };
        names.iter().map(piece).collect()
    };
    let whole = |name: &str| vec![(name.to_owned(), None)];
    Some(match part {
        "norm.weight" => whole("input_layernorm.weight"),
        "mlp.norm.weight" => whole("pre_ff_layernorm.weight"),
        "mlp.gate_up_proj.weight" => rows(&[("feed_forward.gate_proj", d_ff), ("feed_forward.up_proj", d_ff)]),
        "mlp.down_proj.weight" => whole("feed_forward.down_proj.weight"),
        "mixer.qkv_proj.weight" => {
            rows(&[("self_attn.q_proj", d_q), ("self_attn.k_proj", d_kv), ("self_attn.v_proj", d_kv)])
        }
        "mixer.o_proj.weight" => whole("self_attn.o_proj.weight"),
        _ => {
            let name = part.strip_prefix("mixer.")?;
            let norm = ["dt", "b", "c"].iter().find(|n| name == format!("{n}_norm.weight"));
            match norm {
                Some(norm) => whole(&format!("mamba.{norm}_layernorm.weight")),
                None => whole(&format!("mamba.{name}")),
            }
        }
    })
}

fn no_released_name(ours: &str) -> Error {
    Error::Input(format!(
        "the released script has no counterpart of `{ours}`: only released blocks with Mamba-1 can be loaded"
    ))
}
