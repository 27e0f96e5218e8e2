//! A gated MLP in bf16 on Hopper, whose activation and its gradient are made where the products beside them leave their tiles.
// t tokens, i d_model, f d_ff, g 2 d_ff: gate and up

use tch::{Kind, Tensor};

use flowhn_torch::kernel::{Arg, Kernel};
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, product};

use super::product_sm90::{Form, MAX_ROWS, Macros, TILE_ROWS, factor, factor_by_k, fits, multiprocessors, panels};
use crate::grad_place::GradPlace;
use crate::kernels::{GATED_PRODUCT, GATED_PRODUCT_GRAD};
use crate::linear_bf16::rows;

/// `y = (silu(gate) up) W_down^T` with `[gate, up] = x W_gate_up^T` in bf16. Its inputs are x, the leaves that the gradients of both weights
/// go to, and both weights rounded to bf16. The bits are those of the three operations one after the other.
pub(crate) struct GatedMlp {
    /// Where the gradients of both weights go.
    grads: [GradPlace; 2],
    n_multiprocessors: i64,
}

impl GatedMlp {
    /// For x in bf16; `None` where the kernels do not fit or would leave multiprocessors without work. They take compute capability 9.0,
    /// widths of a multiple of 8, and as many tokens and columns as fill the device.
    pub(crate) fn new(x: &Tensor, d_ff: i64, grads: [GradPlace; 2]) -> Result<Option<Self>> {
        let Some(n_multiprocessors) = multiprocessors(x.device())? else { return Ok(None) };
        let d_model = x.size().last().copied().unwrap_or(1).max(1);
        let n_tokens = x.numel() as i64 / d_model;
        let fits = (d_model | d_ff) % 8 == 0
            && n_tokens > TILE_ROWS
            && n_tokens.max(d_ff) <= MAX_ROWS
            && FORWARD.n_tiles(n_tokens, 2 * d_ff) >= n_multiprocessors;
        Ok(fits.then_some(Self { grads, n_multiprocessors }))
    }

    /// h, `[t, f]`, and gate and up, `[t, g]`, if they are wanted.
    fn activation(&self, x_ti: &Tensor, weight_gi: &Tensor, keep: bool) -> Result<(Tensor, Option<Tensor>)> {
        let ([t, i], f) = (matrix_size(x_ti), weight_gi.size()[0] / 2);
        let empty = |width: i64| Ok::<_, Error>(Tensor::f_empty([t, width], (Kind::BFloat16, x_ti.device()))?);
        let (h, gate_up) = (empty(f)?, keep.then(|| empty(2 * f)).transpose()?);
        let weights = halves(weight_gi, 0)?;
        let kept = gate_up.as_ref().map(|gate_up| halves(gate_up, 1)).transpose()?;
        let mut args = vec![factor(x_ti), factor(&weights[0]), factor(&weights[1]), panels(&h)];
        args.extend(kept.iter().flatten().map(panels));
        args.extend([t, f, i].map(|size| Arg::I32(size as i32)));
        let defines = if keep { &KEEP } else { &ACTIVATION_ONLY };
        let kernel = Kernel { source: &GATED_PRODUCT, entry: "gated_product", defines };
        FORWARD.launch(&kernel, [t, 2 * f], self.n_multiprocessors, &args)?;
        Ok((h, gate_up))
    }

    /// The gradient of gate and up, `[t, g]`, from that of y.
    fn activation_grad(&self, gate_up_tg: &Tensor, dy_ti: &Tensor, weight_if: &Tensor) -> Result<Tensor> {
        let ([t, i], f) = (matrix_size(dy_ti), weight_if.size()[1]);
        let grad = Tensor::f_empty(gate_up_tg.size(), (Kind::BFloat16, gate_up_tg.device()))?;
        let (from, to) = (halves(gate_up_tg, 1)?, halves(&grad, 1)?);
        let mut args = vec![factor(dy_ti), factor_by_k(weight_if)];
        args.extend(from.iter().chain(&to).map(panels));
        args.extend([t, f, i].map(|size| Arg::I32(size as i32)));
        let kernel = Kernel { source: &GATED_PRODUCT_GRAD, entry: "gated_product_grad", defines: &BACKWARD_DEFINES };
        BACKWARD.launch(&kernel, [t, f], self.n_multiprocessors, &args)?;
        Ok(grad)
    }
}

impl Function for GatedMlp {
    const NAME: &'static str = "gated mlp";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let (x, weight_gi, weight_if) = (inputs[0], inputs[3], inputs[4]);
        let (h, gate_up) = self.activation(&fitting_rows(x)?, weight_gi, ctx.is_recorded())?;
        let Some(gate_up) = gate_up else {
            // Sizes that come without gradients seldom come again.
            return Ok(vec![h.f_mm(&weight_if.f_tr()?)?.f_view(x.size().as_slice())?]);
        };
        [x, weight_gi, weight_if, &gate_up, &h].into_iter().for_each(|tensor| ctx.save(tensor));
        Ok(vec![product(&h, &weight_if.f_tr()?, Kind::BFloat16)?.f_view(x.size().as_slice())?])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [x, weight_gi, weight_if, gate_up_tg, h_tf] = ctx.saved() else {
            return Err(Error::invalid(Self::NAME, "the saved tensors are not five"));
        };
        let [wants_dx, wants_dgate_up, wants_ddown] = [0, 1, 2].map(|input_idx| ctx.needs_grad(input_idx));
        let (dy_ti, [gate_up, down]) = (fitting_rows(&grads[0])?, &self.grads);
        let ddown = if wants_ddown { down.product(&dy_ti.f_tr()?, h_tf)? } else { None };
        if !(wants_dx || wants_dgate_up) {
            return Ok(vec![None, None, ddown, None, None]);
        }
        let d = self.activation_grad(gate_up_tg, &dy_ti, weight_if)?;
        let dx = || -> Result<Tensor> { Ok(product(&d, weight_gi, Kind::BFloat16)?.f_view(x.size().as_slice())?) };
        let dgate_up = if wants_dgate_up { gate_up.product(&d.f_tr()?, &rows(x)?)? } else { None };
        Ok(vec![wants_dx.then(dx).transpose()?, dgate_up, ddown, None, None])
    }
}

/// Gate and up lie side by side in a tile, which both groups share.
const FORWARD: Form = Form { columns: 256, stages: 4, places: 2 };
/// A group has a tile of its own, so that the other one multiplies while it waits for gate and up.
const BACKWARD: Form = Form { columns: 128, stages: 5, places: 4 };

/// The macros of `gated_product_sm90.cu` that writes gate and up, too, of the one that does not, and those of `gated_product_grad_sm90.cu`.
pub(crate) const KEEP: Macros<4> = FORWARD.defines_and(("KEEP", 1));
pub(crate) const ACTIVATION_ONLY: Macros<4> = FORWARD.defines_and(("KEEP", 0));
pub(crate) const BACKWARD_DEFINES: Macros<3> = BACKWARD.defines();

/// All axes but the last as one, copied if the products do not take them as they are.
fn fitting_rows(x: &Tensor) -> Result<Tensor> {
    let x = rows(x)?;
    if fits(&x) {
        return Ok(x);
    }
    let mut copy = Tensor::f_empty(x.size(), (x.kind(), x.device()))?;
    copy.f_copy_(&x)?;
    Ok(copy)
}

fn matrix_size(matrix: &Tensor) -> [i64; 2] {
    <[i64; 2]>::try_from(matrix.size()).expect("a matrix")
}

/// The two halves of a matrix along an axis.
fn halves(matrix: &Tensor, axis: i64) -> Result<[Tensor; 2]> {
    let half = matrix.size()[axis as usize] / 2;
    Ok([matrix.f_narrow(axis, 0, half)?, matrix.f_narrow(axis, half, half)?])
}
