//! The linear map of bf16 activations by an f32 weight.
// t tokens, i d_in, o d_out

use tch::Tensor;

use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, op};

/// The number by which the dispatcher knows `Kind::Float`.
const FLOAT: op::Arg<'static> = op::Arg::Int(6);

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
        if ctx.is_recorded() {
            ctx.save(x);
            ctx.save(weight_oi);
        }
        Ok(vec![x.f_linear(weight_oi, None::<&Tensor>)?])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [x, weight_oi] = ctx.saved() else {
            return Err(Error::invalid(Self::NAME, "the saved tensors are not two"));
        };
        let rows = |x: &Tensor| -> Result<Tensor> { Ok(x.f_reshape([-1, x.size().last().copied().unwrap_or(1)])?) };
        let (x_ti, grad_to) = (rows(x)?, rows(&grads[0])?);
        let dx = || -> Result<Tensor> { Ok(grad_to.f_mm(weight_oi)?.f_view(x.size().as_slice())?) };
        let dweight = || -> Result<Tensor> {
            let grad_ot = grad_to.f_tr()?;
            let outputs = op::call("aten::mm", "dtype", &[op::Arg::Tensor(&grad_ot), op::Arg::Tensor(&x_ti), FLOAT])?;
            let product = outputs.into_iter().next().flatten();
            product.ok_or_else(|| Error::invalid(Self::NAME, "the product of the gradient is missing"))
        };
        Ok(vec![ctx.needs_grad(0).then(dx).transpose()?, ctx.needs_grad(1).then(dweight).transpose()?, None])
    }
}
