//! Checks of normalisation, SwiGLU, the linear map, the embedding and the loss that run on any device.

mod embedding;
mod fp8;
mod fp8_place;
mod head;
mod linear;
mod mlp;
mod norm;
mod swiglu;

use flowhn_torch::testing::Case;
use flowhn_torch::{Error, Result};
use tch::{Kind, Tensor};

use crate::{Linear, Params, Weight};

/// Every check of this crate.
pub fn cases() -> Vec<Case> {
    let mut cases = embedding::cases();
    cases.extend(fp8::cases());
    cases.extend(fp8_place::cases());
    cases.extend(head::cases());
    cases.extend(linear::cases());
    cases.extend(mlp::cases());
    cases.extend(norm::cases());
    cases.extend(swiglu::cases());
    cases
}

fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::invalid("selftest", message())) }
}

/// Output, gradient of x and gradient of the weight, which has to be of this type, where `dy` comes back.
fn results(params: &Params, projection: &Linear, [x, dy]: [&Tensor; 2], grad_kind: Kind) -> Result<[Tensor; 3]> {
    params.zero_grad()?;
    let x = x.detach().set_requires_grad(true);
    let y = projection.forward(&x)?;
    (&y * dy).sum(Kind::Float).f_backward()?;
    Ok([y.detach(), x.grad(), grad_of(projection.weight(), grad_kind)?])
}

/// A copy of the gradient that has reached a weight, which has to be of this type.
fn grad_of(weight: &Weight, kind: Kind) -> Result<Tensor> {
    let grad = weight.grad()?.filter(|grad| grad.kind() == kind);
    Ok(grad.ok_or_else(|| Error::invalid("grad", format!("there is no gradient in {kind:?}")))?.copy())
}
