//! The linear map of bf16 activations by an f32 weight.
// t tokens, i d_in, o d_out

use tch::{Kind, Tensor};

use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, product};

/// `y = x W^T` in bf16, whose gradient of the weight leaves the matrix product in f32. Its inputs are x, the master W, which the
/// gradient goes to, and W rounded to bf16.
///
/// Through a cast of the weight, that gradient would be rounded to bf16, read again, widened, and only then be in the type of the
/// master: four more bytes an element to write and two to read.
pub(crate) struct LinearCuda;

impl Function for LinearCuda {
    const NAME: &'static str = "linear";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let (x, weight_oi) = (inputs[0], inputs[2]);
        // Sizes that come without gradients, in evaluation, seldom come again.
        if !ctx.is_recorded() {
            return Ok(vec![x.f_linear(weight_oi, None::<&Tensor>)?]);
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
        let dweight = || product(&grad_to.f_tr()?, &x_ti, Kind::Float);
        Ok(vec![ctx.needs_grad(0).then(dx).transpose()?, ctx.needs_grad(1).then(dweight).transpose()?, None])
    }
}

/// All axes but the last as one.
fn rows(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_reshape([-1, x.size().last().copied().unwrap_or(1)])?)
}

/// The size of `x` with another last axis.
fn with_width(x: &Tensor, width: i64) -> Vec<i64> {
    let mut size = x.size();
    if let Some(last) = size.last_mut() {
        *last = width;
    }
    size
}
