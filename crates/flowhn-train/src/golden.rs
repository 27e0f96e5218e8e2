//! The optimiser against golden files: one step from the file's weights and gradients gives the file's next weights.

use std::path::Path;

use flowhn_model::WeightFile;
use flowhn_nn::{Decay, Param, Weight};
use flowhn_torch::catch;
use tch::{Kind, Tensor};

use crate::optim::{AdamW, AdamWOptions, StateType};
use crate::{Error, Result};

/// Most that a weight may differ after one step, relative to its tensor's largest value.
pub const MAX_REL_STEP: f64 = 1e-6;

/// The step that files record: every tensor decays, nothing is clipped.
const OPTIONS: AdamWOptions =
    AdamWOptions { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip_norm: 0., state: StateType::Fp32 };
const LR: f64 = 1e-3;

/// The largest relative error of one AdamW step (learning rate 1e-3, betas 0.9 and 0.95, epsilon 1e-8, decay 0.1 on every tensor) from
/// the weights `w.NAME` and gradients `g.NAME` of a golden file to its `s.NAME`; `None` for a file that records no step.
///
/// # Errors
/// [`Error::Model`] if the file cannot be read or a weight lacks its gradient or next value; [`Error::Tensor`] if libtorch refuses.
pub fn check_golden_step(path: &Path) -> Result<Option<f64>> {
    let file = WeightFile::read(path)?;
    let mut names: Vec<&str> = file.tensors.keys().filter_map(|key| key.strip_prefix("w.")).collect();
    // A tied head may be listed as a weight of its own; it steps with the embedding.
    names.retain(|name| ["g", "s"].iter().any(|prefix| file.tensors.contains_key(&format!("{prefix}.{name}"))));
    names.sort_unstable();
    if !file.tensors.keys().any(|key| key.starts_with("s.")) {
        return Ok(None);
    }
    let of = |prefix: &str, name: &str| -> Result<&Tensor> {
        file.tensors.get(&format!("{prefix}.{name}")).ok_or_else(|| {
            let message = format!("it has `w.{name}` and steps, but no `{prefix}.{name}`");
            Error::Model(flowhn_model::Error::Weights { path: path.to_owned(), message })
        })
    };
    let mut leaves = Vec::new();
    for name in &names {
        let (weight, grad) = (of("w", name)?, of("g", name)?);
        let tensor = catch(|| {
            let tensor = weight.to_kind(Kind::Float).copy().set_requires_grad(true);
            // The gradient of this product is the recorded one, to the bit.
            (&tensor * grad).sum(Kind::Float).backward();
            Ok(tensor)
        })?;
        leaves.push(Param { name: (*name).to_owned(), weight: Weight::new(tensor), decay: Decay::Yes });
    }
    let weights: Vec<Tensor> = leaves.iter().map(|leaf| leaf.weight.master().shallow_clone()).collect();
    let _norm = AdamW::new(leaves, OPTIONS)?.step(LR)?;
    let mut worst = 0f64;
    for (name, weight) in names.iter().zip(&weights) {
        let want = of("s", name)?;
        worst = worst.max(relative_error(&weight.detach(), want)?);
    }
    Ok(Some(worst))
}

/// Infinite where the shapes differ or a value is not a number.
fn relative_error(got: &Tensor, want: &Tensor) -> Result<f64> {
    if got.size() != want.size() {
        return Ok(f64::INFINITY);
    }
    let (error, largest) = catch(|| {
        let (got, want) = (got.to_kind(Kind::Double), want.to_kind(Kind::Double));
        let largest = |x: &Tensor| x.abs().max().double_value(&[]);
        Ok((largest(&(got - &want)), largest(&want)))
    })?;
    Ok(match error / largest {
        _ if error == 0. => 0.,
        relative if relative.is_nan() => f64::INFINITY,
        relative => relative,
    })
}
