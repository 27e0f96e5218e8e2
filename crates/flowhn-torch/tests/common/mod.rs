//! A function made of two closures, so that a test says only what it is about.
#![allow(dead_code, reason = "each test binary uses its part")]

use flowhn_torch::{BackwardCtx, ForwardCtx, Function, Result};
use tch::Tensor;

pub struct Custom<F, B> {
    forward: F,
    backward: B,
}

/// Makes a function of a forward and a backward; what they capture lives as long as the function.
pub fn custom<F, B>(forward: F, backward: B) -> Custom<F, B>
where
    F: FnMut(&mut ForwardCtx, &[&Tensor]) -> Result<Vec<Tensor>> + Send + 'static,
    B: Fn(&BackwardCtx, &[Tensor]) -> Result<Vec<Option<Tensor>>> + Send + 'static,
{
    Custom { forward, backward }
}

impl<F, B> Function for Custom<F, B>
where
    F: FnMut(&mut ForwardCtx, &[&Tensor]) -> Result<Vec<Tensor>> + Send + 'static,
    B: Fn(&BackwardCtx, &[Tensor]) -> Result<Vec<Option<Tensor>>> + Send + 'static,
{
    const NAME: &'static str = "custom";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        (self.forward)(ctx, inputs)
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        (self.backward)(ctx, grads)
    }
}

/// `x * x`, with the input saved.
pub struct Square;

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

/// A leaf that requires a gradient.
pub fn leaf(elements: &[f64]) -> Tensor {
    Tensor::from_slice(elements).set_requires_grad(true)
}

/// The elements of a tensor.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.detach().contiguous().view(-1)).expect("a tensor of numbers")
}
