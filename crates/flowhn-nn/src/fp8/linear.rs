//! The linear map with its products in fp8.
// t tokens, i d_in, o d_out

use tch::{Device, Kind, Tensor};

use flowhn_torch::op::{Arg, call};
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result};

use super::cast::{Rounded, cast, matrix_size};
use super::place::Fp8Place;
use super::scales::Slot;
use super::weight::Fp8Factors;

/// Whether sums may be kept in fewer bits than f32 has, as the tensor cores have them between two additions in f32: fast, and as good as
/// the rounding of the factors asks for where outputs are rounded to bf16 anyway.
pub(super) const FAST_FORWARD: bool = true;
/// The gradient of the input: sums over the outputs' width.
pub(super) const FAST_INPUT_GRAD: bool = false;
/// The gradient of the weight: sums over all tokens.
pub(super) const FAST_WEIGHT_GRAD: bool = false;

/// `y = x W^T` in bf16. Its inputs are x, bf16 or what stands in for it, and the leaf that the gradient of W goes to.
pub(crate) struct LinearFp8 {
    pub(crate) factors: Fp8Factors,
    /// x, where it has been rounded already.
    pub(crate) place: Option<Fp8Place>,
}

impl Function for LinearFp8 {
    const NAME: &'static str = "linear in fp8";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let Fp8Factors { plain: weight_oi, transposed: weight_io, slots: [slot, weight_slot, _], .. } = &self.factors;
        let x = activations(inputs[0], self.place.take(), slot, ctx.needs_grad(1))?;
        let y_to = product(&x.plain, slot, weight_oi, weight_slot, Kind::BFloat16, FAST_FORWARD)?;
        if ctx.is_recorded() {
            ctx.save(weight_io);
            x.transposed.iter().for_each(|x_it| ctx.save(x_it));
        }
        Ok(vec![like(&y_to, inputs[0])?])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [x_slot, weight_slot, slot] = &self.factors.slots;
        self.factors.check_scales(Self::NAME)?;
        let [weight_io, x_it @ ..] = ctx.saved() else {
            return Err(Error::invalid(Self::NAME, "the weight was not saved"));
        };
        let [wants_dx, wants_dweight] = [0, 1].map(|input_idx| ctx.needs_grad(input_idx));
        let grad = rounded(&grads[0], slot, wants_dx, wants_dweight)?;
        let dx = || -> Result<Tensor> {
            let dx_ti = product(&grad.plain, slot, weight_io, weight_slot, Kind::BFloat16, FAST_INPUT_GRAD)?;
            like(&dx_ti, &grads[0])
        };
        let dweight = || -> Result<Tensor> {
            let x_it = x_it.first().ok_or_else(|| Error::invalid(Self::NAME, "the activation was not saved"))?;
            product(&grad.transposed, slot, x_it, x_slot, self.factors.grad_kind, FAST_WEIGHT_GRAD)
        };
        Ok(vec![wants_dx.then(dx).transpose()?, wants_dweight.then(dweight).transpose()?])
    }
}

/// The rows of a product without those that were added, in the leading axes of `x`.
pub(super) fn like(product: &Tensor, x: &Tensor) -> Result<Tensor> {
    let mut shape = x.size();
    if let Some(last) = shape.last_mut() {
        *last = product.size()[1];
    }
    Ok(product.f_narrow(0, 0, matrix_size(x)[0])?.f_view(shape.as_slice())?)
}

/// The activations `x` in fp8, also where they have been rounded already.
pub(super) fn activations(x: &Tensor, place: Option<Fp8Place>, slot: &Slot, transposed: bool) -> Result<Rounded> {
    match place {
        Some(place) => place.into_rounded(slot, transposed),
        None => rounded(x, slot, true, transposed),
    }
}

pub(super) fn rounded(x: &Tensor, slot: &Slot, plain: bool, transposed: bool) -> Result<Rounded> {
    slot.seed_with(|| Ok(x.shallow_clone()))?;
    let [n_rows, n_cols] = matrix_size(x);
    let out = Rounded::empty(n_rows, n_cols, plain, transposed, x, slot.format())?;
    cast(x, slot, &out)?;
    Ok(out)
}

/// `a b^T` of `[m, k]` and `[n, k]`, both contiguous.
pub(super) fn product(
    a: &Option<Tensor>,
    a_slot: &Slot,
    b: &Tensor,
    b_slot: &Slot,
    kind: Kind,
    fast: bool,
) -> Result<Tensor> {
    let missing = || Error::invalid(LinearFp8::NAME, "a factor or a product is missing");
    let a = a.as_ref().ok_or_else(missing)?;
    let (a_inverse, b_inverse, b) = (a_slot.inverse()?, b_slot.inverse()?, b.f_tr()?);
    // libtorch's own on the CPU goes element by element.
    if a.device() == Device::Cpu {
        let product = a.f_to_kind(Kind::Float)?.f_mm(&b.f_to_kind(Kind::Float)?)?;
        return Ok(product.f_mul(&(a_inverse * b_inverse))?.f_to_kind(kind)?);
    }
    // The number by which the dispatcher knows the type.
    let kind = if kind == Kind::Float { 6 } else { 15 };
    let [a, b, a_inverse, b_inverse] = [a, &b, &a_inverse, &b_inverse].map(Arg::Tensor);
    let args = [a, b, a_inverse, b_inverse, Arg::None, Arg::None, Arg::Int(kind), Arg::Bool(fast)];
    call("aten::_scaled_mm", "", &args)?.into_iter().next().flatten().ok_or_else(missing)
}
