//! Argument checks that public operations make once, with errors that name the argument.

use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Checks a whole shape.
///
/// # Errors
/// [`Error::Shape`].
pub fn shape(op: &'static str, arg: &'static str, tensor: &Tensor, want: &[i64]) -> Result<()> {
    let got = tensor.size();
    if got == want {
        return Ok(());
    }
    Err(Error::Shape { op, arg, got, want: format!("{want:?}") })
}

/// Checks the number of dimensions and returns the sizes; `want` spells the axes, as in `[batch, seq_len, d_model]`.
///
/// # Errors
/// [`Error::Shape`].
pub fn dims<const N: usize>(op: &'static str, arg: &'static str, tensor: &Tensor, want: &str) -> Result<[i64; N]> {
    let got = tensor.size();
    <[i64; N]>::try_from(got.as_slice()).map_err(|_| Error::Shape { op, arg, got, want: want.to_owned() })
}

/// Checks the element type.
///
/// # Errors
/// [`Error::Dtype`]; [`Error::Invalid`] if the tensor is undefined or its type has no [`Kind`].
pub fn kind(op: &'static str, arg: &'static str, tensor: &Tensor, allowed: &[Kind]) -> Result<()> {
    let got =
        tensor.f_kind().map_err(|_| Error::invalid(op, format!("{arg} is undefined or of a type unknown to tch")))?;
    if allowed.contains(&got) {
        return Ok(());
    }
    let mut names: Vec<String> = allowed.iter().map(|kind| format!("{kind:?}")).collect();
    names.dedup();
    Err(Error::Dtype { op, arg, got, want: names.join(" or ") })
}

/// Checks that a tensor lives on `device`.
///
/// # Errors
/// [`Error::Device`]; [`Error::Invalid`] if the tensor is undefined.
pub fn device(op: &'static str, arg: &'static str, tensor: &Tensor, device: Device) -> Result<()> {
    if !tensor.defined() {
        return Err(Error::invalid(op, format!("{arg} is undefined")));
    }
    let got = tensor.device();
    if got == device {
        return Ok(());
    }
    Err(Error::Device { op, arg, got, want: format!("{device:?}, where the other arguments are") })
}
