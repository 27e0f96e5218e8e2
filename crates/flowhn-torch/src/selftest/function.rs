//! Autograd functions in Rust.

use tch::{Device, Kind, Tensor};

use super::{all_equal, ensure, error_of};
use crate::testing::Case;
use crate::{BackwardCtx, Error, ForwardCtx, Function, Priority, Result, Stream, apply};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("function: gradients through two of them", gradients),
        Case::new("function: its backward runs on the stream of its forward", stream_of_backward),
        Case::new("function: a panic in the backward is an error", panics),
    ]
}

/// `x * x`, with the input saved.
pub(super) struct Square;

impl Function for Square {
    const NAME: &'static str = "square";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        ctx.save(inputs[0]);
        Ok(vec![inputs[0] * inputs[0]])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(&ctx.saved()[0] * &grads[0] * 2.)])
    }
}

/// `2 x`, with a check in the backward.
struct Double<F>(F);

impl<F: Fn() -> Result<()> + Send + 'static> Function for Double<F> {
    const NAME: &'static str = "double";

    fn forward(&mut self, _: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![inputs[0] * 2.])
    }

    fn backward(&self, _: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        (self.0)()?;
        Ok(vec![Some(&grads[0] * 2.)])
    }
}

fn leaf(value: f64, device: Device) -> Tensor {
    Tensor::full([64], value, (Kind::Float, device)).set_requires_grad(true)
}

/// `(x^2)^2` of 3: 4 * 27.
fn gradients(device: Device) -> Result<String> {
    let x = leaf(3., device);
    let y = apply(Square, &[&x])?.remove(0);
    apply(Square, &[&y])?[0].f_sum(Kind::Float)?.f_backward()?;
    all_equal(&x.grad(), 108.)?;
    Ok(String::new())
}

fn stream_of_backward(device: Device) -> Result<String> {
    let Device::Cuda(device_idx) = device else {
        let x = leaf(3., device);
        apply(Double(|| Ok(())), &[&x])?[0].f_sum(Kind::Float)?.f_backward()?;
        all_equal(&x.grad(), 2.)?;
        return Ok("the CPU has no streams".to_owned());
    };
    let side = Stream::from_pool(device_idx, Priority::Normal)?;
    let _guard = side.enter()?;
    let x = leaf(3., device);
    let on_the_same = move || {
        let current = Stream::current(device_idx)?;
        ensure(current == side, || format!("the backward runs on {current:?}, the forward ran on {side:?}"))
    };
    let y = apply(Double(on_the_same), &[&x])?.remove(0);
    apply(Square, &[&y])?[0].f_sum(Kind::Float)?.f_backward()?;
    all_equal(&x.grad(), 24.)?;
    side.synchronize()?;
    Ok(String::new())
}

fn panics(device: Device) -> Result<String> {
    let failing = Double(|| panic!("half way"));
    let y = apply(failing, &[&leaf(3., device)])?[0].f_sum(Kind::Float)?;
    let message = error_of(y.f_backward().map_err(Error::from))?;
    let told = message.contains("double backward: panic: half way");
    ensure(told, || format!("the message does not tell the panic: {message}"))?;
    Ok(String::new())
}
