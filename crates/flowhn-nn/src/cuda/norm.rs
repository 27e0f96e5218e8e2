//! [`rms_norm`](crate::rms_norm), [`residual_norm`](crate::residual_norm) and [`gated_rms_norm`](crate::gated_rms_norm) on
//! CUDA: one pass over the rows forward, one backward.

use tch::{Kind, Tensor};

use flowhn_torch::kernel::rows::{Fp8Blocks, RowAccess, RowForm, RowTiling, Rows};
use flowhn_torch::kernel::{Arg, ColumnSums, Kernel, KernelSource, kind_define};
use flowhn_torch::{BackwardCtx, ForwardCtx, Function, Result};

use crate::Fp8Place;
use crate::kernels::{GATED_RMS_NORM, RMS_NORM};

pub(crate) struct RmsNormCuda {
    pub(crate) eps: f64,
}

impl Function for RmsNormCuda {
    const NAME: &'static str = "rms_norm";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let norm = Norm { op: Self::NAME, eps: self.eps, recorded: ctx.is_recorded() };
        let Forward { y, rstd, .. } = norm.forward(inputs[0], None, inputs[1], None)?;
        if let Some(rstd) = rstd {
            [inputs[0], inputs[1], &rstd].into_iter().for_each(|x| ctx.save(x));
        }
        Ok(vec![y])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [x, weight, rstd] = ctx.saved() else { unreachable!("three tensors are saved") };
        let (dx, dweight) = backward(Self::NAME, x, weight, rstd, &grads[0], None, ctx.needs_grad(1))?;
        Ok(vec![Some(dx), dweight])
    }
}

/// Inputs: x, weight and, maybe, what is added to x. Outputs: the sum and the normalised sum. Without an addend the sum is x
/// itself, handed on so that its gradient arrives here and is added in the same pass.
pub(crate) struct ResidualNormCuda {
    pub(crate) eps: f64,
    pub(crate) n_inputs: usize,
    /// Where the norm goes, if its reader wants it in fp8.
    pub(crate) place: Option<Fp8Place>,
}

impl Function for ResidualNormCuda {
    const NAME: &'static str = "residual_norm";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let norm = Norm { op: Self::NAME, eps: self.eps, recorded: ctx.is_recorded() };
        let Forward { sum, y, rstd } = norm.forward(inputs[0], inputs.get(2).copied(), inputs[1], self.place.take())?;
        let sum = sum.unwrap_or_else(|| inputs[0].shallow_clone());
        if let Some(rstd) = rstd {
            [&sum, inputs[1], &rstd].into_iter().for_each(|x| ctx.save(x));
        }
        Ok(vec![sum, y])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [sum, weight, rstd] = ctx.saved() else { unreachable!("three tensors are saved") };
        let (dsum, dweight) = backward(Self::NAME, sum, weight, rstd, &grads[1], Some(&grads[0]), ctx.needs_grad(1))?;
        let mut gradients = vec![Some(dsum.shallow_clone()), dweight];
        if self.n_inputs == 3 {
            gradients.push(Some(dsum));
        }
        Ok(gradients)
    }
}

/// Forms of `rms_norm.cu` forward: bounds that leave registers for two blocks and more, since threads hide what a load takes.
const FORWARD: &[RowForm] = &[RowForm::new(1, 512, 2), RowForm::new(2, 512, 2), RowForm::new(3, 256, 3)];
/// Those that round: threads enough to hide the barrier before columns go out, in teams as above, since the order of a row's sum decides
/// its last bits.
const FP8_FORWARD: &[RowForm] = &[RowForm::new(1, 512, 2), RowForm::new(2, 1024, 1), RowForm::new(3, 256, 3)];
/// Backward rows in flight count most, and two vectors a thread keep the most of them, also where some lanes idle; of two blocks one
/// loads while the other adds its sums up.
const BACKWARD: &[RowForm] = &[RowForm::new(2, 512, 1), RowForm::new(2, 256, 2)];
/// Forms of `gated_rms_norm.cu` forward, bounded for the same reason.
const GATED_FORWARD: &[RowForm] = &[RowForm::new(1, 512, 2), RowForm::new(3, 256, 2), RowForm::new(2, 256, 4)];
/// Those that round, as [`FP8_FORWARD`].
const GATED_FP8_FORWARD: &[RowForm] = &[RowForm::new(1, 512, 2), RowForm::new(3, 256, 2), RowForm::new(2, 1024, 1)];
/// Forms of `gated_rms_norm.cu` backward.
const GATED_BACKWARD: &[RowForm] = &[RowForm::new(1, 512, 1), RowForm::new(2, 256, 1), RowForm::new(3, 256, 1)];

struct Norm {
    op: &'static str,
    eps: f64,
    recorded: bool,
}

struct Forward {
    /// Where something is added.
    sum: Option<Tensor>,
    y: Tensor,
    /// Where a backward follows.
    rstd: Option<Tensor>,
}

impl Norm {
    /// With a place, the norm is left there and something stands in for it.
    fn forward(&self, x: &Tensor, delta: Option<&Tensor>, weight: &Tensor, place: Option<Fp8Place>) -> Result<Forward> {
        let x_kind = kind_define(self.op, "x", x)?;
        let (d, weight) = (weight.size()[0], as_f32(weight)?);
        let rows = Rows::new(self.op, &[Some(x), delta].into_iter().flatten().collect::<Vec<_>>())?;
        let sum = delta.map(|_| Tensor::f_empty(x.size(), (x.kind(), x.device()))).transpose()?;
        let rstd = || Tensor::f_empty([i64::from(rows.n_rows())], (Kind::Float, x.device()));
        let rstd = self.recorded.then(rstd).transpose()?;
        let delta = delta.map(|_| rows.tensor(1));
        let mut touched: Vec<&Tensor> = [Some(rows.tensor(0)), delta, Some(&weight)].into_iter().flatten().collect();
        let out = RowsOut::new(x, d, place, &touched)?;
        touched.push(&out.y);
        let tiling = RowTiling::new(self.op, d, if out.blocks.is_some() { FP8_FORWARD } else { FORWARD })?;
        let mut args = vec![Arg::Tensor(rows.tensor(0)), Arg::opt(delta), Arg::Tensor(&weight)];
        args.extend([Arg::opt(sum.as_ref()), out.arg(), Arg::opt(rstd.as_ref())]);
        args.extend(rows.strides(0).into_iter().chain(rows.strides(1)));
        args.extend([Arg::I32(rows.n_rows()), rows.inner(), Arg::I32(d as i32), Arg::I32(tiling.team as i32)]);
        args.push(Arg::F32(self.eps as f32));
        let defines = tiling.defines(x_kind, RowAccess::of(d, &touched));
        let y =
            out.launch(kernel(&RMS_NORM, "rms_norm_forward", &defines), &tiling, [i64::from(rows.n_rows()), 1], args)?;
        Ok(Forward { sum, y, rstd })
    }
}

/// Where a forward kernel leaves its rows.
struct RowsOut {
    /// The rows, or what stands in for them.
    y: Tensor,
    place: Option<Fp8Place>,
    /// With a place: where the kernel itself rounds.
    blocks: Option<Fp8Blocks>,
}

impl RowsOut {
    /// For rows like those of `x`; `read` are the tensors that the kernel reads.
    fn new(x: &Tensor, d: i64, place: Option<Fp8Place>, read: &[&Tensor]) -> Result<Self> {
        let blocks = match &place {
            Some(_) => Fp8Blocks::new(d, read)?,
            None => None,
        };
        let y = match (&place, blocks) {
            (Some(place), Some(_)) => place.stand_in(),
            _ => Tensor::f_empty(x.size(), (x.kind(), x.device()))?,
        };
        Ok(Self { y, place, blocks })
    }

    /// The argument for rows that are stored as they are.
    fn arg(&self) -> Arg<'_> {
        Arg::opt(self.blocks.is_none().then_some(&self.y))
    }

    /// Launches a kernel, given as the variant that stores rows, with its arguments; returns those rows, or what stands in for them.
    fn launch<'a>(
        &'a self,
        plain: Kernel,
        tiling: &RowTiling,
        [n_rows, n_groups]: [i64; 2],
        mut args: Vec<Arg<'a>>,
    ) -> Result<Tensor> {
        if let (Some(place), Some(blocks)) = (&self.place, self.blocks) {
            args.extend(place.args());
            let defines = tiling.form.fp8_defines();
            let grid = [blocks.n_blocks(place.n_padded()) as u32, n_groups as u32, 1];
            Kernel { defines: &defines, ..plain }.launch(grid, tiling.block(), blocks.shared_bytes, &args)?;
            return Ok(self.y.shallow_clone());
        }
        if n_rows > 0 {
            let grid = [tiling.n_blocks(n_rows, self.y.device())? as u32, n_groups as u32, 1];
            plain.launch(grid, tiling.block(), 0, &args)?;
        }
        self.place.as_ref().map_or_else(|| Ok(self.y.shallow_clone()), |place| place.fill(&self.y))
    }
}

/// The gradients of the sum (or of x) and, if wanted, of the weight; `ds` is what reaches the sum on other ways.
fn backward(
    op: &'static str,
    sum: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
    dy: &Tensor,
    ds: Option<&Tensor>,
    wants_dweight: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let x_kind = kind_define(op, "x", sum)?;
    let (d, weight_kind, weight) = (weight.size()[0], weight.kind(), as_f32(weight)?);
    let tiling = RowTiling::new(op, d, BACKWARD)?;
    let rows = Rows::new(op, &[Some(sum), Some(dy), ds].into_iter().flatten().collect::<Vec<_>>())?;
    let ds = ds.map(|_| rows.tensor(2));
    let dx = Tensor::f_empty(sum.size(), (sum.kind(), sum.device()))?;
    let n_blocks = tiling.n_resident_blocks(i64::from(rows.n_rows()), sum.device())?;
    let dweight = ColumnSums::new(&[(n_blocks, wants_dweight)], d, sum.device())?;
    let touched: Vec<&Tensor> =
        [Some(rows.tensor(0)), Some(rows.tensor(1)), ds, Some(&weight), Some(&dx)].into_iter().flatten().collect();
    let entry = if ds.is_some() { "residual_norm_backward" } else { "rms_norm_backward" };
    let mut args = vec![Arg::Tensor(rows.tensor(0)), Arg::Tensor(rows.tensor(1))];
    args.extend(ds.map(Arg::Tensor));
    args.extend([Arg::Tensor(&weight), Arg::Tensor(rstd), Arg::Tensor(&dx), dweight.arg()]);
    args.extend((0..2 + usize::from(ds.is_some())).flat_map(|idx| rows.strides(idx)));
    args.extend([Arg::I32(rows.n_rows()), rows.inner(), Arg::I32(d as i32), Arg::I32(tiling.team as i32)]);
    let defines = tiling.defines(x_kind, RowAccess::of(d, &touched));
    kernel(&RMS_NORM, entry, &defines).launch([n_blocks as u32, 1, 1], tiling.block(), tiling.column_bytes(), &args)?;
    Ok((dx, dweight.totals(weight_kind)?.remove(0)))
}

pub(crate) struct GatedRmsNormCuda {
    pub(crate) eps: f64,
    pub(crate) n_groups: i64,
    /// Where the norm goes, if its reader wants it in fp8.
    pub(crate) place: Option<Fp8Place>,
}

impl Function for GatedRmsNormCuda {
    const NAME: &'static str = "gated_rms_norm";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let (x, weight) = (inputs[0], as_f32(inputs[2])?);
        let x_kind = kind_define(Self::NAME, "x", x)?;
        let d = weight.size()[0] / self.n_groups;
        let rows = Rows::new(Self::NAME, &inputs[..2])?;
        let (n_rows, n_groups) = (i64::from(rows.n_rows()), self.n_groups);
        let mut touched = vec![rows.tensor(0), rows.tensor(1), &weight];
        let out = RowsOut::new(x, d, self.place.take(), &touched)?;
        touched.push(&out.y);
        let forms = if out.blocks.is_some() { GATED_FP8_FORWARD } else { GATED_FORWARD };
        let tiling = RowTiling::new(Self::NAME, d, forms)?;
        let rstd = Tensor::f_empty([n_rows, n_groups], (Kind::Float, x.device()))?;
        let mut args = vec![Arg::Tensor(rows.tensor(0)), Arg::Tensor(rows.tensor(1)), Arg::Tensor(&weight)];
        args.extend([out.arg(), Arg::Tensor(&rstd)]);
        args.extend(rows.strides(0).into_iter().chain(rows.strides(1)));
        args.extend([Arg::I32(rows.n_rows()), rows.inner(), Arg::I32(d as i32), Arg::I32(tiling.team as i32)]);
        args.push(Arg::F32(self.eps as f32));
        let defines = tiling.defines(x_kind, RowAccess::of(d, &touched));
        let y =
            out.launch(kernel(&GATED_RMS_NORM, "gated_rms_norm_forward", &defines), &tiling, [n_rows, n_groups], args)?;
        if ctx.is_recorded() {
            inputs.iter().for_each(|input| ctx.save(input));
            ctx.save(&rstd);
        }
        Ok(vec![y])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [x, z, weight, rstd] = ctx.saved() else { unreachable!("four tensors are saved") };
        let x_kind = kind_define(Self::NAME, "x", x)?;
        let (width, weight_kind, weight) = (weight.size()[0], weight.kind(), as_f32(weight)?);
        let d = width / self.n_groups;
        let tiling = RowTiling::new(Self::NAME, d, GATED_BACKWARD)?;
        let dx = Tensor::f_empty(x.size(), (x.kind(), x.device()))?;
        // Up to three axes make rows at two strides whatever the gaps between them.
        let dz = if z.dim() <= 3 { ctx.grad_place(1, z)? } else { dx.f_empty_like()? };
        let rows = Rows::new(Self::NAME, &[x, z, &grads[0], &dz])?;
        // Each group has blocks of its own.
        let resident = tiling.n_resident_blocks(i64::from(rows.n_rows()), x.device())?;
        let n_blocks = (resident / self.n_groups).max(1);
        let dweight = ColumnSums::new(&[(n_blocks, ctx.needs_grad(2))], width, x.device())?;
        let [[x_outer, x_inner], [z_outer, z_inner], [dy_outer, dy_inner], [dz_outer, dz_inner]] =
            [0, 1, 2, 3].map(|idx| rows.strides(idx));
        let touched = [rows.tensor(0), rows.tensor(1), rows.tensor(2), &weight, &dx, &dz];
        let defines = tiling.defines(x_kind, RowAccess::of(d, &touched));
        kernel(&GATED_RMS_NORM, "gated_rms_norm_backward", &defines).launch(
            [n_blocks as u32, self.n_groups as u32, 1],
            tiling.block(),
            tiling.column_bytes(),
            &[
                Arg::Tensor(rows.tensor(0)),
                Arg::Tensor(rows.tensor(1)),
                Arg::Tensor(rows.tensor(2)),
                Arg::Tensor(&weight),
                Arg::Tensor(rstd),
                Arg::Tensor(&dx),
                Arg::Tensor(&dz),
                dweight.arg(),
                x_outer,
                x_inner,
                z_outer,
                z_inner,
                dy_outer,
                dy_inner,
                dz_outer,
                dz_inner,
                Arg::I32(rows.n_rows()),
                rows.inner(),
                Arg::I32(d as i32),
                Arg::I32(tiling.team as i32),
            ],
        )?;
        Ok(vec![Some(dx), Some(dz), dweight.totals(weight_kind)?.remove(0)])
    }
}

/// The weight as the kernels take it: f32, contiguous.
fn as_f32(weight: &Tensor) -> Result<Tensor> {
    Ok(weight.f_to_kind(Kind::Float)?.f_contiguous()?)
}

fn kernel<'a>(source: &'static KernelSource, entry: &'static str, defines: &'a [(&'static str, i64)]) -> Kernel<'a> {
    Kernel { source, entry, defines }
}
