//! SwiGLU between two products in fp8, whose values never are in memory in bf16.
// t tokens, i d_model, f d_ff, g 2 d_ff: gate and up

use tch::{Device, Kind, Tensor};

use flowhn_torch::kernel::{Arg, Kernel};
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result};

use super::cast::{Rounded, THREADS, cast, padded, tiles};
use super::linear::{FAST_FORWARD, FAST_INPUT_GRAD, FAST_WEIGHT_GRAD, activations, like, product, rounded};
use super::place::Fp8Place;
use super::scales::Slot;
use super::weight::Fp8Factors;
use crate::kernels::SWIGLU_FP8;
use crate::rows::no_kernel;
use crate::swiglu::{swiglu, swiglu_grad};

/// `y = (silu(gate) up) W_down^T` with `[gate, up] = x W_gate_up^T`. Its inputs are x, bf16 or what stands in for it, and the leaves that the
/// gradients of both weights go to. The bits are those of the three operations one after the other.
pub(crate) struct MlpFp8 {
    gate_up: Fp8Factors,
    down: Fp8Factors,
    /// x, where it has been rounded already.
    place: Option<Fp8Place>,
}

impl MlpFp8 {
    pub(crate) fn new(gate_up: Fp8Factors, down: Fp8Factors, place: Option<Fp8Place>) -> Self {
        Self { gate_up, down, place }
    }
}

impl Function for MlpFp8 {
    const NAME: &'static str = "mlp in fp8";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let (gate_up, down) = (&self.gate_up, &self.down);
        let ([x_slot, gate_up_slot, _], [h_slot, down_slot, _]) = (&gate_up.slots, &down.slots);
        let x = activations(inputs[0], self.place.take(), x_slot, ctx.needs_grad(1))?;
        // Rows that were added for the product go on being zeros.
        let gate_up_tg = product(&x.plain, x_slot, &gate_up.plain, gate_up_slot, Kind::BFloat16, FAST_FORWARD)?;
        let h = rounded_swiglu(&gate_up_tg, h_slot, ctx.needs_grad(2))?;
        let y_ti = product(&h.plain, h_slot, &down.plain, down_slot, Kind::BFloat16, FAST_FORWARD)?;
        if ctx.is_recorded() {
            for tensor in [&gate_up.transposed, &down.transposed, &gate_up_tg] {
                ctx.save(tensor);
            }
            [x.transposed, h.transposed].iter().flatten().for_each(|tensor| ctx.save(tensor));
        }
        Ok(vec![like(&y_ti, inputs[0])?])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let (gate_up, down) = (&self.gate_up, &self.down);
        gate_up.check_scales(Self::NAME)?;
        let ([x_slot, gate_up_slot, slot], [h_slot, down_slot, dy_slot]) = (&gate_up.slots, &down.slots);
        let [weight_ig, weight_fi, gate_up_tg, transposed @ ..] = ctx.saved() else {
            return Err(Error::invalid(Self::NAME, "the saved tensors are fewer than three"));
        };
        let [wants_dx, wants_dgate_up, wants_ddown] = [0, 1, 2].map(|input_idx| ctx.needs_grad(input_idx));
        let mut transposed = transposed.iter();
        let mut next = |wanted: bool| if wanted { transposed.next() } else { None };
        let (x_it, h_ft) = (next(wants_dgate_up), next(wants_ddown));

        let dy = rounded(&grads[0], dy_slot, wants_dx || wants_dgate_up, wants_ddown)?;
        let ddown = h_ft
            .map(|h_ft| product(&dy.transposed, dy_slot, h_ft, h_slot, down.grad_kind, FAST_WEIGHT_GRAD))
            .transpose()?;
        if !(wants_dx || wants_dgate_up) {
            return Ok(vec![None, None, ddown]);
        }
        let dh_tf = product(&dy.plain, dy_slot, weight_fi, down_slot, Kind::BFloat16, FAST_INPUT_GRAD)?;
        drop(dy);
        let d = rounded_swiglu_grad(gate_up_tg, &dh_tf, slot, wants_dx, wants_dgate_up)?;
        let dx = || -> Result<Tensor> {
            let dx_ti = product(&d.plain, slot, weight_ig, gate_up_slot, Kind::BFloat16, FAST_INPUT_GRAD)?;
            like(&dx_ti, &grads[0])
        };
        let dgate_up = x_it
            .map(|x_it| product(&d.transposed, slot, x_it, x_slot, gate_up.grad_kind, FAST_WEIGHT_GRAD))
            .transpose()?;
        Ok(vec![wants_dx.then(dx).transpose()?, dgate_up, ddown])
    }
}

/// SwiGLU of bf16 `[t, 2 f]`, t a multiple of 16, rounded to bf16 and then to fp8.
fn rounded_swiglu(gate_up_tg: &Tensor, slot: &Slot, transposed: bool) -> Result<Rounded> {
    let [n_rows, f] = [gate_up_tg.size()[0], gate_up_tg.size()[1] / 2];
    let out = Rounded::empty(n_rows, f, true, transposed, gate_up_tg, slot.format())?;
    slot.seed_with(|| swiglu(gate_up_tg))?;
    match gate_up_tg.device() {
        Device::Cpu => cast(&swiglu(gate_up_tg)?, slot, &out)?,
        Device::Cuda(_) => launch("swiglu_forward_fp8", &[gate_up_tg], slot, &out, n_rows, f)?,
        device => return Err(no_kernel(MlpFp8::NAME, "x", device)),
    }
    Ok(out)
}

/// The gradient of gate and up, `[t, 2 f]`, from that of SwiGLU, rounded to bf16 and then to fp8.
fn rounded_swiglu_grad(
    gate_up_tg: &Tensor,
    dh_tf: &Tensor,
    slot: &Slot,
    plain: bool,
    transposed: bool,
) -> Result<Rounded> {
    let [n_rows, f] = [gate_up_tg.size()[0], gate_up_tg.size()[1] / 2];
    let out = Rounded::empty(n_rows, 2 * f, plain, transposed, gate_up_tg, slot.format())?;
    slot.seed_with(|| swiglu_grad(gate_up_tg, dh_tf))?;
    match gate_up_tg.device() {
        Device::Cpu => cast(&swiglu_grad(gate_up_tg, dh_tf)?, slot, &out)?,
        Device::Cuda(_) => launch("swiglu_backward_fp8", &[gate_up_tg, dh_tf], slot, &out, n_rows, f)?,
        device => return Err(no_kernel(MlpFp8::NAME, "x", device)),
    }
    Ok(out)
}

/// Launches a kernel on matrices that products left: contiguous.
fn launch(entry: &'static str, from: &[&Tensor], slot: &Slot, out: &Rounded, n_rows: i64, f: i64) -> Result<()> {
    let mut args: Vec<Arg> = from.iter().flat_map(|x| [Arg::Tensor(x), Arg::I64(x.stride()[0])]).collect();
    args.extend([
        Arg::opt(out.plain.as_ref()),
        Arg::opt(out.transposed.as_ref()),
        Arg::Tensor(slot.numbers()),
        Arg::I32(n_rows as i32),
        Arg::I32(padded(n_rows) as i32),
        Arg::I32(f as i32),
    ]);
    let defines = [("FORMAT", slot.format().define())];
    Kernel { source: &SWIGLU_FP8, entry, defines: &defines }.launch([tiles(f), tiles(n_rows), 1], THREADS, 0, &args)
}
