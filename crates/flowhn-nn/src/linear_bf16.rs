//! The linear map of bf16 activations by an f32 weight.
// t tokens, i d_in, o d_out

use tch::{Kind, Tensor};

use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, product};

use crate::cuda::linear::one_token;
use crate::grad_place::GradPlace;

/// `y = x W^T` in bf16, whose gradient of the weight leaves the matrix product in the type that it has from then on. Its inputs are x, the
/// leaf that the gradient goes to, f32 or bf16, and W rounded to bf16.
///
/// Through a cast of the weight, the gradient of an f32 master would be rounded to bf16, read again, and widened: four more bytes an
/// element to write and two to read.
pub(crate) struct LinearBf16 {
    /// Where the gradient of the weight goes.
    pub(crate) grad: GradPlace,
}

impl Function for LinearBf16 {
    const NAME: &'static str = "linear";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let (x, weight_oi) = (inputs[0], inputs[2]);
        if !ctx.is_recorded() {
            // Sizes that come without gradients, in evaluation, seldom come again.
            let is_one_token = x.size().iter().rev().skip(1).all(|&size| size == 1);
            if is_one_token && x.device().is_cuda() {
                return Ok(vec![one_token(x, weight_oi)?]);
            }
            let y = rows(x)?.f_mm(&weight_oi.f_tr()?)?;
            return Ok(vec![y.f_view(with_width(x, weight_oi.size()[0]).as_slice())?]);
        }
        ctx.save(x);
        ctx.save(weight_oi);
        let y = product(&rows(x)?, &weight_oi.f_tr()?, Kind::BFloat16)?;
        Ok(vec![y.f_view(with_width(x, weight_oi.size()[0]).as_slice())?])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [x, weight_oi] = ctx.saved() else {
            return Err(Error::invalid(Self::NAME, "the saved tensors are not two"));
        };
        let (x_ti, grad_to) = (rows(x)?, rows(&grads[0])?);
        let dx =
            || -> Result<Tensor> { Ok(product(&grad_to, weight_oi, Kind::BFloat16)?.f_view(x.size().as_slice())?) };
        let dweight = if ctx.needs_grad(1) { self.grad.product(&grad_to.f_tr()?, &x_ti)? } else { None };
        Ok(vec![ctx.needs_grad(0).then(dx).transpose()?, dweight, None])
    }
}

/// All axes but the last as one.
pub(crate) fn rows(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_reshape([-1, x.size().last().copied().unwrap_or(1)])?)
}

/// The size of `x` with another last axis.
pub(crate) fn with_width(x: &Tensor, width: i64) -> Vec<i64> {
    let mut size = x.size();
    if let Some(last) = size.last_mut() {
        *last = width;
    }
    size
}
