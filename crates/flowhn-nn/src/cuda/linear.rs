//! The linear map of bf16 activations by an f32 weight.
// t tokens, i d_in, o d_out

use tch::{Kind, Tensor};

use flowhn_torch::kernel::rows::{rows_are_aligned, with_dense_rows};
use flowhn_torch::kernel::{Arg, Kernel};
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, product};

use crate::kernels::LINEAR_ROW;

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
        if !ctx.is_recorded() {
            // Sizes that come without gradients, in evaluation, seldom come again.
            let is_one_token = x.size().iter().rev().skip(1).all(|&size| size == 1);
            if is_one_token {
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

/// The product of one token, as in decoding: a matrix times a vector, whose time is that of reading the matrix. libtorch's takes twice
/// as long for small matrices; it keeps those whose rows are not aligned to 16 bytes.
fn one_token(x: &Tensor, weight_oi: &Tensor) -> Result<Tensor> {
    const WARPS: u32 = 2;
    let x = with_dense_rows(x)?;
    let (size, weight_size) = (x.size(), weight_oi.size());
    let fits = size.last() == weight_size.last() && weight_oi.stride()[1] == 1 && weight_oi.kind() == Kind::BFloat16;
    let [d_out, d_in] = [weight_size[0], weight_size[1]];
    if !fits || x.numel() == 0 || !rows_are_aligned(d_in, &[&x, weight_oi]) {
        return Ok(x.f_linear(weight_oi, None::<&Tensor>)?);
    }
    let y = Tensor::f_empty(with_width(&x, d_out), (x.kind(), x.device()))?;
    Kernel { source: &LINEAR_ROW, entry: "linear_row", defines: &[] }.launch(
        [(d_out as u32).div_ceil(WARPS), 1, 1],
        32 * WARPS,
        0,
        &[
            Arg::Tensor(&x),
            Arg::Tensor(weight_oi),
            Arg::Tensor(&y),
            Arg::I64(weight_oi.stride()[0]),
            Arg::I32(d_out as i32),
            Arg::I32(d_in as i32),
        ],
    )?;
    Ok(y)
}
