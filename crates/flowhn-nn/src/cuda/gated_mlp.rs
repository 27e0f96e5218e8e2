//! A gated MLP in bf16 on Hopper, whose activation and its gradient are made where the products beside them leave their tiles.
// t tokens, i d_model, f d_ff, g 2 d_ff: gate and up

use tch::{Kind, Tensor};

use flowhn_torch::kernel::{Arg, Boxes, Kernel};
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, product};

use super::product_sm90::{Form, multiprocessors, sent};
use super::swiglu::SwiGluCuda;
use crate::kernels::{GATED_PRODUCT, GATED_PRODUCT_GRAD};
use crate::linear_bf16::rows;

/// Rows of the boxes in which a factor with k from row to row is copied.
const K_ROWS: u32 = 64;

/// `y = (silu(gate) up) W_down^T` with `[gate, up] = x W_gate_up^T` in bf16. Its inputs are x, the leaves that the gradients of both weights
/// go to, and both weights rounded to bf16. The bits are those of the three operations one after the other.
pub(crate) struct GatedMlp {
    /// The types of the gradients of both weights.
    grad_kinds: [Kind; 2],
    n_multiprocessors: i64,
}

impl GatedMlp {
    /// For x in bf16; `None` where the kernels do not fit or would leave multiprocessors without work. They take compute capability 9.0,
    /// widths of a multiple of 8, rows that begin at 16 bytes, and as many tokens and columns as fill the device.
    pub(crate) fn new(x: &Tensor, d_ff: i64, grad_kinds: [Kind; 2]) -> Result<Option<Self>> {
        if d_ff % 8 > 0 || x.numel() == 0 {
            return Ok(None);
        }
        let x_ti = rows(x)?;
        let Some(n_multiprocessors) = multiprocessors(&[&x_ti])? else { return Ok(None) };
        let n_tokens = x_ti.size()[0];
        let fits =
            FORWARD.n_tiles(n_tokens, 2 * d_ff) >= n_multiprocessors && i32::try_from(n_tokens.max(d_ff)).is_ok();
        Ok(fits.then_some(Self { grad_kinds, n_multiprocessors }))
    }

    /// h, `[t, f]`, and gate and up, `[t, g]`, if they are wanted.
    fn activation(&self, x_ti: &Tensor, weight_gi: &Tensor, keep: bool) -> Result<(Tensor, Option<Tensor>)> {
        let ([t, i], f) = (matrix_size(x_ti), weight_gi.size()[0] / 2);
        let empty = |width: i64| Ok::<_, Error>(Tensor::f_empty([t, width], (Kind::BFloat16, x_ti.device()))?);
        let (h, gate_up) = (empty(f)?, keep.then(|| empty(2 * f)).transpose()?);
        let weights = halves(weight_gi, 0)?;
        let kept = gate_up.as_ref().map(|gate_up| halves(gate_up, 1)).transpose()?;
        let factor = |matrix| Arg::Boxes(Boxes { matrix, n_rows: Form::FACTOR_ROWS });
        let mut args = vec![factor(x_ti), factor(&weights[0]), factor(&weights[1]), sent(&h)];
        args.extend(kept.iter().flatten().map(sent));
        args.extend([t, f, i].map(|size| Arg::I32(size as i32)));
        Kernel { source: &GATED_PRODUCT, entry: "gated_product", defines: &forward_defines(keep) }.launch(
            FORWARD.grid(t, 2 * f, self.n_multiprocessors),
            Form::N_THREADS,
            FORWARD.shared_bytes(),
            &args,
        )?;
        Ok((h, gate_up))
    }

    /// The gradient of gate and up, `[t, g]`, from that of y.
    fn activation_grad(&self, gate_up_tg: &Tensor, dy_ti: &Tensor, weight_if: &Tensor) -> Result<Tensor> {
        if multiprocessors(&[dy_ti])?.is_none() {
            // A gradient that came in another layout.
            return SwiGluCuda::grad(gate_up_tg, &product(dy_ti, weight_if, Kind::BFloat16)?);
        }
        let ([t, i], f) = (matrix_size(dy_ti), weight_if.size()[1]);
        let grad = Tensor::f_empty(gate_up_tg.size(), (Kind::BFloat16, gate_up_tg.device()))?;
        let (from, to) = (halves(gate_up_tg, 1)?, halves(&grad, 1)?);
        let mut args = vec![
            Arg::Boxes(Boxes { matrix: dy_ti, n_rows: Form::FACTOR_ROWS }),
            Arg::Boxes(Boxes { matrix: weight_if, n_rows: K_ROWS }),
        ];
        args.extend(from.iter().chain(&to).map(sent));
        args.extend([t, f, i].map(|size| Arg::I32(size as i32)));
        Kernel { source: &GATED_PRODUCT_GRAD, entry: "gated_product_grad", defines: &BACKWARD.defines() }.launch(
            BACKWARD.grid(t, f, self.n_multiprocessors),
            Form::N_THREADS,
            BACKWARD.shared_bytes(),
            &args,
        )?;
        Ok(grad)
    }
}

impl Function for GatedMlp {
    const NAME: &'static str = "gated mlp";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let (x, weight_gi, weight_if) = (inputs[0], inputs[3], inputs[4]);
        let (h, gate_up) = self.activation(&rows(x)?, weight_gi, ctx.is_recorded())?;
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
        let (dy_ti, [gate_up_kind, down_kind]) = (rows(&grads[0])?, self.grad_kinds);
        let ddown = wants_ddown.then(|| product(&dy_ti.f_tr()?, h_tf, down_kind)).transpose()?;
        if !(wants_dx || wants_dgate_up) {
            return Ok(vec![None, None, ddown, None, None]);
        }
        let d = self.activation_grad(gate_up_tg, &dy_ti, weight_if)?;
        let dx = || -> Result<Tensor> { Ok(product(&d, weight_gi, Kind::BFloat16)?.f_view(x.size().as_slice())?) };
        let dgate_up = || product(&d.f_tr()?, &rows(x)?, gate_up_kind);
        Ok(vec![wants_dx.then(dx).transpose()?, wants_dgate_up.then(dgate_up).transpose()?, ddown, None, None])
    }
}

/// Gate and up lie side by side in a tile, which both groups share.
const FORWARD: Form = Form { columns: 256, stages: 4, places: 2 };
/// A group has a tile of its own, so that the other one multiplies while it waits for gate and up.
const BACKWARD: Form = Form { columns: 128, stages: 5, places: 4 };

/// The macros of `gated_product_sm90.cu`; `keep` if gate and up are written.
pub(crate) const fn forward_defines(keep: bool) -> [(&'static str, i64); 4] {
    let [columns, stages, places] = FORWARD.defines();
    [columns, stages, places, ("KEEP", keep as i64)]
}

/// The macros of `gated_product_grad_sm90.cu`.
pub(crate) const fn backward_defines() -> [(&'static str, i64); 3] {
    BACKWARD.defines()
}

fn matrix_size(matrix: &Tensor) -> [i64; 2] {
    <[i64; 2]>::try_from(matrix.size()).expect("a matrix")
}

/// The two halves of a matrix along an axis.
fn halves(matrix: &Tensor, axis: i64) -> Result<[Tensor; 2]> {
    let half = matrix.size()[axis as usize] / 2;
    Ok([matrix.f_narrow(axis, 0, half)?, matrix.f_narrow(axis, half, half)?])
}
