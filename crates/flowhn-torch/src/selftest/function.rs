//! Autograd functions in Rust.

use tch::{Device, Kind, Tensor};

use super::{all_equal, ensure, error_of, of_cuda};
use crate::testing::Case;
use crate::{BackwardCtx, Error, ForwardCtx, Function, Priority, Result, Stream, apply};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("function: gradients through two of them", gradients),
        Case::new("function: its backward runs on the stream of its forward", stream_of_backward),
        Case::new("function: a panic in the backward is an error", panics),
        of_cuda("function: too much memory is an error that names it, and work goes on", too_much_memory),
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

/// Forward and backward ask for a pebibyte.
fn too_much_memory(device_idx: usize) -> Result<String> {
    struct Greedy {
        begins: bool,
    }

    impl Greedy {
        fn ask(device: Device) -> Result<()> {
            Tensor::f_empty([1 << 50], (Kind::Uint8, device)).map(drop).map_err(Error::from)
        }
    }

    impl Function for Greedy {
        const NAME: &'static str = "greedy";

        fn forward(&mut self, _: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
            if self.begins {
                Self::ask(inputs[0].device())?;
            }
            Ok(vec![inputs[0] * 2.])
        }

        fn backward(&self, _: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
            Self::ask(grads[0].device())?;
            Ok(vec![None])
        }
    }

    let x = leaf(3., Device::Cuda(device_idx));
    let forward = apply(Greedy { begins: true }, &[&x]).map(drop);
    let y = apply(Greedy { begins: false }, &[&x])?.remove(0);
    let backward = y.f_sum(Kind::Float)?.f_backward().map_err(Error::from);
    for (outcome, who) in [(forward, "greedy: "), (backward, "greedy backward: ")] {
        let is_told = |text: &str| {
            text.starts_with(who) && text.contains("Tried to allocate 1048576.00 GiB") && text.contains("is free")
        };
        let is_right = matches!(&outcome, Err(Error::OutOfMemory(text)) if is_told(text));
        ensure(is_right, || format!("{who}{outcome:?}"))?;
    }
    gradients(Device::Cuda(device_idx))
}
