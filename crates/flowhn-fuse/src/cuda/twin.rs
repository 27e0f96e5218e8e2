//! RMSNorm of every token for two branches, with the residual addition before it: one pass forward, one backward.

// b batch, l seq_len, d features

use tch::{Kind, Tensor};

use flowhn_torch::kernel::rows::{RowAccess, RowForm, RowTiling, Rows};
use flowhn_torch::kernel::{Arg, ColumnSums, Kernel, kind_define};
use flowhn_torch::{BackwardCtx, ForwardCtx, Function, Result};

use super::f32s;
use crate::kernels::{TWIN_NORM, norm as defines};

/// The form forward. One vector a thread: two weights take registers.
const FORWARD: &[RowForm] = &[RowForm::new(1, 512, 2)];
/// And backward, where up to six rows are under way twice.
const BACKWARD: &[RowForm] = &[RowForm::new(1, 512, 1)];

/// Inputs x, the branches' weights and, maybe, what is added to x. Outputs as those of [`SplitNorm`](super::SplitNorm) whose routes both take all
/// tokens: the sum, each branch's normalised tokens and, where the branches want them, the sum once more for each.
pub(crate) struct TwinNorm {
    pub(crate) eps: f64,
    pub(crate) n_inputs: usize,
    pub(crate) with_tokens: bool,
}

impl TwinNorm {
    /// The widest rows; wider ones would take more vectors a thread, and registers that are not there.
    pub(crate) const MAX_WIDTH: i64 = 4096;
}

impl Function for TwinNorm {
    const NAME: &'static str = "twin_norm";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let (x, change) = (inputs[0], inputs.get(3).copied());
        let (d, weights) = (inputs[1].size()[0], f32s(&inputs[1..3])?);
        let x_kind = kind_define(Self::NAME, "x_bld", x)?;
        let rows = Rows::new(Self::NAME, &[Some(x), change].into_iter().flatten().collect::<Vec<_>>())?;
        let n_rows = rows.n_rows();
        let empty = || Tensor::f_empty(x.size(), (x.kind(), x.device()));
        let sum = change.map(|_| empty()).transpose()?;
        let (y0, y1) = (empty()?, empty()?);
        let rstd = Tensor::f_empty([i64::from(n_rows)], (Kind::Float, x.device()))?;
        let change = change.map(|_| rows.tensor(1));
        let touched: Vec<&Tensor> =
            [rows.tensor(0), &weights[0], &weights[1], &y0, &y1].into_iter().chain(change).collect();
        if n_rows > 0 {
            let tiling = RowTiling::new(Self::NAME, d, FORWARD)?;
            let mut args = vec![Arg::Tensor(rows.tensor(0)), Arg::opt(change)];
            args.extend(weights.iter().map(Arg::Tensor));
            args.extend([Arg::opt(sum.as_ref()), Arg::Tensor(&y0), Arg::Tensor(&y1), Arg::Tensor(&rstd)]);
            args.extend(rows.strides(0).into_iter().chain(rows.strides(1)));
            args.extend([Arg::I32(n_rows), rows.inner(), Arg::I32(d as i32), Arg::I32(tiling.team as i32)]);
            args.push(Arg::F32(self.eps as f32));
            let defines = defines(tiling.form, x_kind, RowAccess::of(d, &touched), false);
            let kernel = Kernel { source: &TWIN_NORM, entry: "twin_norm_forward", defines: &defines };
            let n_blocks = tiling.n_blocks(i64::from(n_rows), x.device())?;
            kernel.launch([n_blocks as u32, 1, 1], tiling.block(), 0, &args)?;
        }
        let sum = sum.unwrap_or_else(|| x.shallow_clone());
        if ctx.is_recorded() {
            [&sum, inputs[1], inputs[2], &rstd].into_iter().for_each(|x| ctx.save(x));
        }
        let mut outputs = vec![sum, y0, y1];
        if self.with_tokens {
            let tokens = || outputs[0].f_narrow(1, 0, outputs[0].size()[1]);
            let tokens = [tokens()?, tokens()?];
            outputs.extend(tokens);
        }
        Ok(outputs)
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [sum, weight0, weight1, rstd] = ctx.saved() else { unreachable!("four tensors are saved") };
        let (d, weights) = (weight0.size()[0], f32s(&[weight0, weight1])?);
        let x_kind = kind_define(Self::NAME, "x_bld", sum)?;
        let tiling = RowTiling::new(Self::NAME, d, BACKWARD)?;
        // The sum's gradient comes behind those of the norms, then those of the branches' tokens.
        let read: Vec<&Tensor> =
            [sum, &grads[1], &grads[2], &grads[0]].into_iter().chain(grads.iter().skip(3)).collect();
        let rows = Rows::new(Self::NAME, &read)?;
        let dx = Tensor::f_empty(sum.size(), (sum.kind(), sum.device()))?;
        let n_blocks = tiling.n_resident_blocks(i64::from(rows.n_rows()), sum.device())?;
        let wanted = [ctx.needs_grad(1), ctx.needs_grad(2)];
        let dweights = ColumnSums::new(&wanted.map(|wanted| (n_blocks, wanted)), d, sum.device())?;
        let tensors = || (0..read.len()).map(|idx| rows.tensor(idx));
        let touched: Vec<&Tensor> = tensors().chain(&weights).chain([&dx]).collect();
        let mut args: Vec<Arg> = tensors().chain(&weights).map(Arg::Tensor).collect();
        args.extend([Arg::Tensor(rstd), Arg::Tensor(&dx), dweights.arg()]);
        args.extend((0..read.len()).flat_map(|idx| rows.strides(idx)));
        args.extend([Arg::I32(rows.n_rows()), rows.inner(), Arg::I32(d as i32), Arg::I32(tiling.team as i32)]);
        let defines = defines(tiling.form, x_kind, RowAccess::of(d, &touched), self.with_tokens);
        let kernel = Kernel { source: &TWIN_NORM, entry: "twin_norm_backward", defines: &defines };
        // Both weights, and behind the last row the columns that teams add up.
        kernel.launch([n_blocks as u32, 1, 1], tiling.block(), tiling.weight_bytes(2), &args)?;
        let dchange = (self.n_inputs == 4).then(|| Some(dx.shallow_clone()));
        let dweights = dweights.totals(weight0.kind())?;
        Ok([Some(dx)].into_iter().chain(dweights).chain(dchange).collect())
    }
}
