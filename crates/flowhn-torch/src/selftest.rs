//! Checks of streams, events, memory, graphs, autograd functions, kernel launches and products.
//!
//! Those about the device itself are for CUDA devices alone.

#[cfg(flowhn_cuda)]
mod activity;
mod device;
mod function;
#[cfg(flowhn_cuda)]
mod graph;
mod launch;
mod product;
mod timeline;

use tch::{Device, Kind, Tensor};

use crate::testing::Case;
use crate::{Error, Result};

/// Every check of this crate.
pub fn cases() -> Vec<Case> {
    let mut cases = device::cases();
    #[cfg(flowhn_cuda)]
    cases.extend(activity::cases());
    cases.extend(function::cases());
    #[cfg(flowhn_cuda)]
    cases.extend(graph::cases());
    cases.extend(launch::cases());
    cases.extend(product::cases());
    cases.extend(timeline::cases());
    cases
}

/// A check of what only a CUDA device has, given its index.
fn of_cuda(name: &str, check: fn(usize) -> Result<String>) -> Case {
    Case::on_cuda(name, move |device| match device {
        Device::Cuda(device_idx) => check(device_idx),
        other => Err(Error::Device { op: "selftest", arg: "device", got: other, want: "a CUDA device".to_owned() }),
    })
}

/// An error with this message unless `holds`.
fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::invalid("selftest", message())) }
}

/// The message of what has to fail.
fn error_of<T>(outcome: Result<T>) -> Result<String> {
    match outcome {
        Ok(_) => Err(Error::invalid("selftest", "what had to fail went through".to_owned())),
        Err(error) => Ok(error.to_string()),
    }
}

/// Fails unless every element of a tensor is `want`.
fn all_equal(tensor: &Tensor, want: f64) -> Result<()> {
    let n_off = tensor.f_ne(want)?.f_sum(Kind::Int64)?.int64_value(&[]);
    ensure(n_off == 0, || format!("{n_off} of {} elements are not {want}", tensor.numel()))
}
