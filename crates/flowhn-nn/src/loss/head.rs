//! The arithmetic of the LM head on the CPU: matrix products by libtorch, softmax by rows in between.
// t n_tokens, r tokens of a chunk, d d_model, v vocab_size

use rayon::prelude::*;
use tch::Tensor;

use flowhn_torch::{Result, cpu};

use crate::simd::{self, Real, Storage, dispatch};

/// Bytes of a chunk's logits: few enough to stay in a large cache and in memory that the allocator keeps; wide
/// vocabularies still get [`MIN_CHUNK_ROWS`] so that each pass over the weight does enough work.
const CHUNK_BYTES: usize = 8 << 20;
const MIN_CHUNK_ROWS: usize = 64;

/// Which gradients to compute.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub(super) x: bool,
    pub(super) weight: bool,
}

/// The mean loss and the gradients that were wanted.
pub(super) struct LossAndGrads {
    pub(super) loss: Tensor,
    pub(super) dx: Option<Tensor>,
    pub(super) dweight: Option<Tensor>,
}

/// Loss of each token, `[t]`.
pub(super) fn losses<T: Storage>(x: &Tensor, weight: &Tensor, targets: &[i64], ignored: i64) -> Result<Tensor> {
    let vocab_size = weight.size()[0] as usize;
    let weight_t = weight.tr();
    let (out, ()) = cpu::try_build(&[targets.len() as i64], |out: &mut [T::Acc]| {
        for_chunks::<T>(x, &weight_t, vocab_size, |start, logits| {
            let rows = start..start + logits.len() / vocab_size;
            let jobs = out[rows.clone()].par_iter_mut().zip(&targets[rows]).zip(logits.par_chunks_exact(vocab_size));
            jobs.for_each(|((loss, &target), logits)| {
                *loss = if target == ignored {
                    T::Acc::ZERO
                } else {
                    dispatch(
                        #[inline(always)]
                        || token_loss(logits, target as usize),
                    )
                };
            });
            Ok(())
        })
    })?;
    Ok(out)
}

/// The mean loss and its gradients, which are done in the same pass over the chunks; that of the weight comes in `dweight_kind`.
pub(super) fn loss_and_grads<T: Storage>(
    x: &Tensor,
    weight: &Tensor,
    targets: &[i64],
    ignored: i64,
    wanted: Wanted,
    dweight_kind: tch::Kind,
) -> Result<LossAndGrads> {
    let n_counted = targets.iter().filter(|&&target| target != ignored).count();
    let mean = |losses: &Tensor| -> Result<Tensor> {
        let total: f64 = cpu::slice::<T::Acc>(losses)?.iter().map(|loss| loss.to_f64()).sum();
        let mean = T::Acc::from_f64(total / n_counted.max(1) as f64);
        cpu::from_slice(&[], &[mean])
    };
    if !wanted.x && !wanted.weight {
        let losses = losses::<T>(x, weight, targets, ignored)?;
        return Ok(LossAndGrads { loss: mean(&losses)?, dx: None, dweight: None });
    }

    let vocab_size = weight.size()[0] as usize;
    let scale = T::Acc::from_f64(1. / n_counted.max(1) as f64);
    let dx = wanted.x.then(|| x.empty_like());
    let mut dweight = wanted.weight.then(|| WeightGrad::new(weight));
    let weight_t = weight.tr();
    let (losses, ()) = cpu::try_build(&[targets.len() as i64], |losses: &mut [T::Acc]| {
        for_chunks::<T>(x, &weight_t, vocab_size, |start, logits| {
            let rows = start..start + logits.len() / vocab_size;
            let n_rows = rows.len() as i64;
            let dlogits = cpu::build(&[n_rows, vocab_size as i64], |dlogits: &mut [T]| {
                dlogits
                    .par_chunks_exact_mut(vocab_size)
                    .zip(logits.par_chunks_exact(vocab_size))
                    .zip(losses[rows.clone()].par_iter_mut().zip(&targets[rows]))
                    .for_each_init(
                        || vec![T::Acc::ZERO; vocab_size],
                        |exps, ((dlogits, logits), (loss, &target))| {
                            if target == ignored {
                                *loss = T::Acc::ZERO;
                                dlogits.fill(T::narrow(T::Acc::ZERO));
                            } else {
                                *loss = dispatch(
                                    #[inline(always)]
                                    || token_loss_and_grad(logits, target as usize, scale, exps, dlogits),
                                );
                            }
                        },
                    );
            });
            if let Some(dx) = &dx {
                let _ = dlogits.f_mm_out(&dx.narrow(0, start as i64, n_rows), weight)?;
            }
            if let Some(dweight) = &mut dweight {
                dweight.add_product(&dlogits, &x.narrow(0, start as i64, n_rows))?;
            }
            Ok(())
        })
    })?;
    Ok(LossAndGrads { loss: mean(&losses)?, dx, dweight: dweight.map(|grad| grad.finish(dweight_kind)) })
}

/// Calls `work(first_row, logits)` for each chunk of rows of `x W^T`; the chunks share one buffer.
fn for_chunks<T: Storage>(
    x: &Tensor,
    weight_t: &Tensor,
    vocab_size: usize,
    mut work: impl FnMut(usize, &[T]) -> Result<()>,
) -> Result<()> {
    let n_tokens = x.size()[0] as usize;
    let most = (CHUNK_BYTES / (size_of::<T>() * vocab_size)).max(MIN_CHUNK_ROWS);
    // Chunks of nearly one size, instead of a small rest at the end.
    let n_rows = n_tokens.div_ceil(n_tokens.div_ceil(most).max(1)).max(1);
    let buffer = Tensor::empty([n_rows.min(n_tokens) as i64, vocab_size as i64], (x.kind(), x.device()));
    for start in (0..n_tokens).step_by(n_rows) {
        let n_rows = n_rows.min(n_tokens - start) as i64;
        let logits = buffer.narrow(0, 0, n_rows);
        let _ = x.narrow(0, start as i64, n_rows).f_mm_out(&logits, weight_t)?;
        work(start, cpu::slice::<T>(&logits)?)?;
    }
    Ok(())
}

/// The gradient of the weight while chunks are added to it; bf16 chunks are added up in f32.
struct WeightGrad {
    sum: Tensor,
    is_empty: bool,
    kind: tch::Kind,
}

impl WeightGrad {
    fn new(weight: &Tensor) -> Self {
        let kind = weight.kind();
        let sum_kind = if kind == tch::Kind::BFloat16 { tch::Kind::Float } else { kind };
        Self { sum: Tensor::empty(weight.size(), (sum_kind, weight.device())), is_empty: true, kind }
    }

    /// Adds `dlogits^T x`.
    fn add_product(&mut self, dlogits: &Tensor, x: &Tensor) -> Result<()> {
        let same_kind = self.kind == self.sum.kind();
        match (self.is_empty, same_kind) {
            (true, true) => drop(dlogits.tr().f_mm_out(&self.sum, x)?),
            (true, false) => self.sum.f_copy_(&dlogits.tr().f_mm(x)?)?,
            (false, true) => drop(self.sum.f_addmm_(&dlogits.tr(), x)?),
            (false, false) => drop(self.sum.f_add_(&dlogits.tr().f_mm(x)?)?),
        }
        self.is_empty = false;
        Ok(())
    }

    fn finish(self, kind: tch::Kind) -> Tensor {
        let sum = if self.is_empty { self.sum.zeros_like() } else { self.sum };
        sum.to_kind(kind)
    }
}

/// `ln sum_j exp(l_j) - l_target`, with the largest logit taken out of both terms so that neither overflows nor
/// cancels.
#[inline(always)]
fn token_loss<T: Storage>(logits: &[T], target: usize) -> T::Acc {
    let largest = simd::max(logits);
    let total = simd::sum(
        logits,
        #[inline(always)]
        |logit| (logit.widen() - largest).exp(),
    );
    total.ln() - (logits[target].widen() - largest)
}

/// As [`token_loss`]; also writes `scale (softmax(l) - onehot(target))`.
#[inline(always)]
fn token_loss_and_grad<T: Storage>(
    logits: &[T],
    target: usize,
    scale: T::Acc,
    exps: &mut [T::Acc],
    dlogits: &mut [T],
) -> T::Acc {
    let largest = simd::max(logits);
    let total = simd::map_sum(
        logits,
        exps,
        #[inline(always)]
        |logit| (logit.widen() - largest).exp(),
    );
    let factor = scale / total;
    for (dlogit, &exp) in dlogits.iter_mut().zip(&*exps) {
        *dlogit = T::narrow(exp * factor);
    }
    dlogits[target] = T::narrow((exps[target] / total - T::Acc::ONE) * scale);
    total.ln() - (logits[target].widen() - largest)
}
