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

/// Gradients of two backward passes that are added up by their products are the sums of both, but for roundings of the sum, and autograd gets
/// none of them.
fn grads_add_in_place(params: &Params, forward: &dyn Fn(&Tensor) -> Result<Tensor>, x: [&Tensor; 2]) -> Result<String> {
    let device = x[0].device();
    let backward = |x: &Tensor| -> Result<Vec<Tensor>> {
        let y = forward(x)?;
        (&y * &y).sum(Kind::Float).f_backward()?;
        params.iter().map(|param| grad_of(&param.weight, param.weight.grad_kind())).collect()
    };
    let alone = |x: &Tensor| params.zero_grad().and_then(|()| backward(x));
    let each = [alone(x[0])?, alone(x[1])?];
    params.add_grads_in_place();
    alone(x[0])?;
    let mut worst = 0f64;
    for (i, got) in backward(x[1])?.iter().enumerate() {
        let [first, second] = each.each_ref().map(|grads| grads[i].to_kind(Kind::Double));
        let roundings = if got.kind() == Kind::BFloat16 { 2f64.powi(-7) } else { 2f64.powi(-22) };
        let allowed = (first.abs() + second.abs()).max().double_value(&[]) * roundings;
        let error = (got.to_kind(Kind::Double) - (first + second)).abs().max().double_value(&[]);
        ensure(error <= allowed, || format!("weight {i}: off by {error:.2e}, allowed {allowed:.2e}"))?;
        worst = worst.max(error / allowed);
    }
    for param in params.iter() {
        let (leaf, kind) = (param.weight.grad_leaf(), param.weight.grad_kind());
        let y = forward(x[0])?;
        let got = Tensor::f_run_backward(&[(&y * &y).sum(Kind::Float)], &[leaf], false, false);
        // The CPU adds in place where it leaves gradients in bf16 alone.
        let by_products = device.is_cuda() || kind == Kind::BFloat16;
        let is_there = got.is_ok_and(|grads| grads.iter().all(Tensor::defined));
        ensure(is_there != by_products, || format!("{}: autograd's gradient is there: {is_there}", param.name))?;
    }
    Ok(format!("{:.0} % of the roundings", 100. * worst))
}

/// A copy of the gradient that has reached a weight, which has to be of this type.
fn grad_of(weight: &Weight, kind: Kind) -> Result<Tensor> {
    let grad = weight.grad()?.filter(|grad| grad.kind() == kind);
    Ok(grad.ok_or_else(|| Error::invalid("grad", format!("there is no gradient in {kind:?}")))?.copy())
}
