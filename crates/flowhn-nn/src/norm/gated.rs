//! [`gated_rms_norm`](super::gated_rms_norm) on the CPU: one pass over the rows forward, one backward; the gate is
//! computed again in the backward instead of being kept.

use tch::Tensor;

use flowhn_torch::cpu;
use flowhn_torch::{BackwardCtx, ForwardCtx, Function, Result};

use super::plain::reciprocal_root;
use crate::rows::{Rows, add_up, block_rows, for_float_kind, map_blocks2, with_contiguous_rows};
use crate::simd::{self, Real, Storage, dispatch};

pub(super) struct GatedRmsNormCpu {
    pub(super) eps: f64,
    pub(super) n_groups: usize,
}

impl Function for GatedRmsNormCpu {
    const NAME: &'static str = "gated_rms_norm";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let (x, z, weight) = (with_contiguous_rows(inputs[0]), with_contiguous_rows(inputs[1]), inputs[2]);
        let (y, rstd) =
            for_float_kind!(Self::NAME, "x", x.kind(), T => forward::<T>(&x, &z, weight, self.eps, self.n_groups))?;
        if ctx.is_recorded() {
            inputs.iter().for_each(|input| ctx.save(input));
            ctx.save(&rstd);
        }
        Ok(vec![y])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [x, z, weight, rstd] = ctx.saved() else { unreachable!("four tensors are saved") };
        let (x, z, dy) = (with_contiguous_rows(x), with_contiguous_rows(z), with_contiguous_rows(&grads[0]));
        let (dx, dz, dweight) = for_float_kind!(Self::NAME, "x", x.kind(),
            T => backward::<T>(&x, &z, weight, rstd, &dy, self.n_groups))?;
        Ok(vec![Some(dx), Some(dz), Some(dweight)])
    }
}

/// Returns `y` and the reciprocal root of each row's groups, `[n_rows, n_groups]`.
fn forward<T: Storage>(x: &Tensor, z: &Tensor, weight: &Tensor, eps: f64, n_groups: usize) -> Result<(Tensor, Tensor)> {
    let weight = weight.to_kind(<T::Acc as cpu::Element>::KIND).contiguous();
    let weight = cpu::slice::<T::Acc>(&weight)?;
    let (d, x_rows, z_rows) = (weight.len(), Rows::<T>::new(x)?, Rows::<T>::new(z)?);
    let block = block_rows(x_rows.n_rows());
    cpu::try_build(&x.size(), |y: &mut [T]| {
        Ok(cpu::build(&[x_rows.n_rows() as i64, n_groups as i64], |rstd: &mut [T::Acc]| {
            map_blocks2((y, block * d), (rstd, block * n_groups), |block_idx, y, rstd| {
                let mut gated = vec![T::Acc::ZERO; d];
                dispatch(
                    #[inline(always)]
                    || {
                        for (i, (y, rstd)) in y.chunks_exact_mut(d).zip(rstd.chunks_exact_mut(n_groups)).enumerate() {
                            let row_idx = block_idx * block + i;
                            gate_row(x_rows.row(row_idx), z_rows.row(row_idx), &mut gated);
                            normalise_row(&gated, weight, eps, y, rstd);
                        }
                    },
                );
            });
        }))
    })
}

#[inline(always)]
fn gate_row<T: Storage>(x: &[T], z: &[T], gated: &mut [T::Acc]) {
    for ((gated, x), z) in gated.iter_mut().zip(x).zip(z) {
        *gated = x.widen() * z.widen().silu();
    }
}

#[inline(always)]
fn normalise_row<T: Storage>(gated: &[T::Acc], weight: &[T::Acc], eps: f64, y: &mut [T], rstd: &mut [T::Acc]) {
    let n = gated.len() / rstd.len();
    let groups = gated.chunks_exact(n).zip(weight.chunks_exact(n)).zip(y.chunks_exact_mut(n));
    for (((gated, weight), y), rstd) in groups.zip(rstd) {
        *rstd = reciprocal_root(
            simd::sum(
                gated,
                #[inline(always)]
                |u| u * u,
            ),
            n,
            eps,
        );
        for ((y, &u), &weight) in y.iter_mut().zip(gated).zip(weight) {
            *y = T::narrow(u * *rstd * weight);
        }
    }
}

/// With `u = x silu(z)`, `g = dy * weight` and `r` the saved reciprocal root of the group: `du = r g - u r^3 mean(g
/// u)`, `dx = du silu(z)`, `dz = du x silu'(z)`, `dweight = sum_rows dy u r`.
fn backward<T: Storage>(
    x: &Tensor,
    z: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
    dy: &Tensor,
    n_groups: usize,
) -> Result<(Tensor, Tensor, Tensor)> {
    let weight_kind = weight.kind();
    let weight = weight.to_kind(<T::Acc as cpu::Element>::KIND).contiguous();
    let weight = cpu::slice::<T::Acc>(&weight)?;
    let rstd = cpu::slice::<T::Acc>(rstd)?;
    let (d, x_rows, z_rows, dy_rows) = (weight.len(), Rows::<T>::new(x)?, Rows::<T>::new(z)?, Rows::<T>::new(dy)?);
    let block = block_rows(x_rows.n_rows());
    let (dx, (dz, partials)) = cpu::try_build(&x.size(), |dx: &mut [T]| {
        cpu::try_build(&x.size(), |dz: &mut [T]| {
            Ok(map_blocks2((dx, block * d), (dz, block * d), |block_idx, dx, dz| {
                let mut dweight = vec![T::Acc::ZERO; d];
                let mut scratch = GateRow { value: vec![T::Acc::ZERO; d], slope: vec![T::Acc::ZERO; d] };
                dispatch(
                    #[inline(always)]
                    || {
                        for (i, (dx, dz)) in dx.chunks_exact_mut(d).zip(dz.chunks_exact_mut(d)).enumerate() {
                            let row_idx = block_idx * block + i;
                            let (x, z, dy) = (x_rows.row(row_idx), z_rows.row(row_idx), dy_rows.row(row_idx));
                            let rstd = &rstd[row_idx * n_groups..][..n_groups];
                            scratch.fill(z);
                            let n = d / n_groups;
                            for (group_idx, &rstd) in rstd.iter().enumerate() {
                                let span = group_idx * n..(group_idx + 1) * n;
                                backward_group(
                                    &x[span.clone()],
                                    &scratch.value[span.clone()],
                                    &scratch.slope[span.clone()],
                                    &weight[span.clone()],
                                    rstd,
                                    &dy[span.clone()],
                                    &mut dx[span.clone()],
                                    &mut dz[span.clone()],
                                    &mut dweight[span],
                                );
                            }
                        }
                    },
                );
                dweight
            }))
        })
    })?;
    let dweight = cpu::build(&[d as i64], |total: &mut [T::Acc]| {
        total.fill(T::Acc::ZERO);
        add_up(total, &partials);
    });
    Ok((dx, dz, dweight.to_kind(weight_kind)))
}

/// `silu(z)` and its derivative over one row.
struct GateRow<R> {
    value: Vec<R>,
    slope: Vec<R>,
}

impl<R: Real> GateRow<R> {
    #[inline(always)]
    fn fill<T: Storage<Acc = R>>(&mut self, z: &[T]) {
        for ((value, slope), z) in self.value.iter_mut().zip(&mut self.slope).zip(z) {
            (*value, *slope) = z.widen().silu_and_derivative();
        }
    }
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "one slice for each letter of the formula")]
fn backward_group<T: Storage>(
    x: &[T],
    gate: &[T::Acc],
    gate_slope: &[T::Acc],
    weight: &[T::Acc],
    rstd: T::Acc,
    dy: &[T],
    dx: &mut [T],
    dz: &mut [T],
    dweight: &mut [T::Acc],
) {
    let n = dx.len();
    let (x, gate, gate_slope, weight, dy) = (&x[..n], &gate[..n], &gate_slope[..n], &weight[..n], &dy[..n]);
    let (dz, dweight) = (&mut dz[..n], &mut dweight[..n]);
    let inner = simd::sum4(
        x,
        gate,
        weight,
        dy,
        #[inline(always)]
        |x, gate, weight, dy| dy.widen() * weight * (x.widen() * gate),
    );
    let slope = inner * rstd * rstd * rstd / T::Acc::from_f64(n as f64);
    for i in 0..n {
        let (x, dy) = (x[i].widen(), dy[i].widen());
        let u = x * gate[i];
        dweight[i] += dy * (u * rstd);
        let du = rstd * (dy * weight[i]) - u * slope;
        dx[i] = T::narrow(du * gate[i]);
        dz[i] = T::narrow(du * x * gate_slope[i]);
    }
}
