//! [`rms_norm`](super::rms_norm) on the CPU: one pass over the rows forward, one backward.

use tch::Tensor;

use flowhn_torch::cpu;
use flowhn_torch::{BackwardCtx, ForwardCtx, Function, Result};

use crate::rows::{Rows, add_up, block_rows, for_float_kind, map_blocks, map_blocks2, with_contiguous_rows};
use crate::simd::{self, Real, Storage, dispatch};

pub(super) struct RmsNormCpu {
    pub(super) eps: f64,
}

impl Function for RmsNormCpu {
    const NAME: &'static str = "rms_norm";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let (x, weight) = (with_contiguous_rows(inputs[0]), inputs[1]);
        let (y, rstd) = for_float_kind!(Self::NAME, "x", x.kind(), T => forward::<T>(&x, weight, self.eps))?;
        if ctx.is_recorded() {
            ctx.save(inputs[0]);
            ctx.save(weight);
            ctx.save(&rstd);
        }
        Ok(vec![y])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [x, weight, rstd] = ctx.saved() else { unreachable!("three tensors are saved") };
        let (x, dy) = (with_contiguous_rows(x), with_contiguous_rows(&grads[0]));
        let (dx, dweight) = for_float_kind!(Self::NAME, "x", x.kind(), T => backward::<T>(&x, weight, rstd, &dy))?;
        Ok(vec![Some(dx), Some(dweight)])
    }
}

/// Returns `y` and `1 / sqrt(mean(x^2) + eps)` of each row.
fn forward<T: Storage>(x: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let weight = weight.to_kind(<T::Acc as cpu::Element>::KIND).contiguous();
    let weight = cpu::slice::<T::Acc>(&weight)?;
    let (d, rows) = (weight.len(), Rows::<T>::new(x)?);
    let block = block_rows(rows.n_rows());
    cpu::try_build(&x.size(), |y: &mut [T]| {
        Ok(cpu::build(&[rows.n_rows() as i64], |rstd: &mut [T::Acc]| {
            map_blocks2((y, block * d), (rstd, block), |block_idx, y, rstd| {
                dispatch(
                    #[inline(always)]
                    || {
                        for (i, (y, rstd)) in y.chunks_exact_mut(d).zip(rstd).enumerate() {
                            *rstd = forward_row(rows.row(block_idx * block + i), weight, eps, y);
                        }
                    },
                );
            });
        }))
    })
}

#[inline(always)]
fn forward_row<T: Storage>(x: &[T], weight: &[T::Acc], eps: f64, y: &mut [T]) -> T::Acc {
    let squares = simd::sum(
        x,
        #[inline(always)]
        |x| x.widen() * x.widen(),
    );
    let rstd = reciprocal_root(squares, x.len(), eps);
    for ((y, x), &weight) in y.iter_mut().zip(x).zip(weight) {
        *y = T::narrow(T::narrow(x.widen() * rstd).widen() * weight);
    }
    rstd
}

/// `1 / sqrt(squares / n + eps)`.
#[inline(always)]
pub(super) fn reciprocal_root<R: Real>(squares: R, n: usize, eps: f64) -> R {
    R::ONE / (squares / R::from_f64(n as f64) + R::from_f64(eps)).sqrt()
}

/// With `g = dy * weight` and `r` the saved reciprocal root: `dx = r g - x r^3 mean(g x)`, `dweight = sum_rows dy x r`.
fn backward<T: Storage>(x: &Tensor, weight: &Tensor, rstd: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let weight_kind = weight.kind();
    let weight = weight.to_kind(<T::Acc as cpu::Element>::KIND).contiguous();
    let weight = cpu::slice::<T::Acc>(&weight)?;
    let rstd = cpu::slice::<T::Acc>(rstd)?;
    let (d, x_rows, dy_rows) = (weight.len(), Rows::<T>::new(x)?, Rows::<T>::new(dy)?);
    let block = block_rows(x_rows.n_rows());
    let (dx, dweight) = cpu::try_build(&x.size(), |dx: &mut [T]| {
        let partials = map_blocks(dx, block * d, |block_idx, dx| {
            let mut dweight = vec![T::Acc::ZERO; d];
            dispatch(
                #[inline(always)]
                || {
                    for (i, dx) in dx.chunks_exact_mut(d).enumerate() {
                        let row_idx = block_idx * block + i;
                        let (x, dy) = (x_rows.row(row_idx), dy_rows.row(row_idx));
                        backward_row(x, weight, rstd[row_idx], dy, dx, &mut dweight);
                    }
                },
            );
            dweight
        });
        Ok(cpu::build(&[d as i64], |total: &mut [T::Acc]| {
            total.fill(T::Acc::ZERO);
            add_up(total, &partials);
        }))
    })?;
    Ok((dx, dweight.to_kind(weight_kind)))
}

#[inline(always)]
fn backward_row<T: Storage>(x: &[T], weight: &[T::Acc], rstd: T::Acc, dy: &[T], dx: &mut [T], dweight: &mut [T::Acc]) {
    let n = dx.len();
    let (x, weight, dy, dweight) = (&x[..n], &weight[..n], &dy[..n], &mut dweight[..n]);
    let inner = simd::sum3(
        x,
        weight,
        dy,
        #[inline(always)]
        |x, weight, dy| dy.widen() * weight * x.widen(),
    );
    let slope = inner * rstd * rstd * rstd / T::Acc::from_f64(n as f64);
    for i in 0..n {
        let (x, dy) = (x[i].widen(), dy[i].widen());
        dweight[i] += dy * (x * rstd);
        dx[i] = T::narrow(rstd * (dy * weight[i]) - x * slope);
    }
}
