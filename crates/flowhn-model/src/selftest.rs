//! Checks of whole models that run on any device: small ones of every kind, and the released one.

mod causality;
mod decode;
mod golden;
mod gradients;
mod recompute;
mod rows;
pub mod small;

use flowhn_torch::testing::Case;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Every check of this crate.
pub fn cases() -> Vec<Case> {
    let lists =
        [golden::cases(), causality::cases(), decode::cases(), gradients::cases(), recompute::cases(), rows::cases()];
    lists.into_iter().flatten().collect()
}

/// A check in the words of this crate's error.
fn case(name: String, check: impl Fn(Device) -> Result<String> + Send + Sync + 'static) -> Case {
    Case::new(name, move |device| check(device).map_err(in_words_of_tensors))
}

/// A check of something that only a CUDA device has.
fn case_on_cuda(name: String, check: impl Fn(Device) -> Result<String> + Send + Sync + 'static) -> Case {
    Case::on_cuda(name, move |device| check(device).map_err(in_words_of_tensors))
}

fn in_words_of_tensors(error: Error) -> flowhn_torch::Error {
    match error {
        Error::Tensor(error) => error,
        other => flowhn_torch::Error::invalid("model", other.to_string()),
    }
}

/// An error with this message unless `holds`.
fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Input(message())) }
}

/// Largest absolute value; NaN if any element is.
fn max_abs(tensor: &Tensor) -> f64 {
    tensor.abs().max().double_value(&[])
}

/// Largest difference relative to the largest value of `want`.
fn max_rel(got: &Tensor, want: &Tensor) -> Result<f64> {
    ensure(got.size() == want.size(), || format!("shape {:?}, expected {:?}", got.size(), want.size()))?;
    let (got, want) = (got.to_kind(Kind::Double), want.to_kind(Kind::Double));
    Ok(max_abs(&(got - &want)) / max_abs(&want))
}
