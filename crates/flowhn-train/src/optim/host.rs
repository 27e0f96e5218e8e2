//! The update of [`AdamW`](super::AdamW) on the CPU where the means are not kept in f32: element after element, with the roundings of the
//! CUDA kernels, so that both come to the same means, to the bit, from the same gradients.

use flowhn_torch::cpu;
use half::bf16;
use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::blockwise::{BLOCK, Codes};
use super::state::Mean;
use super::{AdamWOptions, Group};

/// What all elements share in an update.
#[derive(Clone, Copy)]
pub(super) struct Factors {
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    step_size: f32,
    root_scale: f32,
    eps: f32,
    decay: f32,
    key: u32,
}

impl Factors {
    /// Those of update `step`, counted from 1, with learning rate `lr`.
    pub fn new(options: &AdamWOptions, step: f64, lr: f64) -> Self {
        let &AdamWOptions { beta1, beta2, eps, weight_decay, .. } = options;
        Self {
            beta1: beta1 as f32,
            rest1: (1. - beta1) as f32,
            beta2: beta2 as f32,
            rest2: (1. - beta2) as f32,
            step_size: (lr / (1. - beta1.powf(step))) as f32,
            root_scale: (1. / (1. - beta2.powf(step)).sqrt()) as f32,
            eps: eps as f32,
            decay: (lr * weight_decay) as f32,
            key: mix(step as u32),
        }
    }

    /// The weight and both means of an element after the update.
    fn update(&self, p: f32, m: f32, v: f32, g: f32, decay: f32) -> (f32, f32, f32) {
        let m = self.beta1.mul_add(m, self.rest1 * g);
        let v = self.beta2.mul_add(v, self.rest2 * g * g);
        let p = p - decay * p;
        (p - self.step_size * m / (v.sqrt() * self.root_scale + self.eps), m, v)
    }
}

/// A hash of 32 bits (Wellons' lowbias32).
fn mix(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// One of the two bf16 around `x`, the upper one with the probability of the place of `x` between them; `noise` is below 2^16.
fn round_at_random(x: f32, noise: u32) -> bf16 {
    if x.is_finite() { bf16::from_bits(((x.to_bits() + noise) >> 16) as u16) } else { bf16::from_f32(x) }
}

/// Updates the parameters of a group with their gradients as they are; `first_slot` is the number of its first parameter among all.
pub(super) fn update(
    group: &Group,
    grads: &[Tensor],
    factors: &Factors,
    decays: bool,
    first_slot: usize,
) -> flowhn_torch::Result<()> {
    let decay = if decays { factors.decay } else { 0. };
    let (signed, unsigned) = (Codes::signed(), Codes::unsigned());
    for (idx, (weight, grad)) in group.weights.iter().zip(grads).enumerate() {
        let (mean, mean_sq) = (&group.exp_avg[idx], &group.exp_avg_sq[idx]);
        let (mut ms, mut vs) = (read(mean, &signed)?, read(mean_sq, &unsigned)?);
        let grad = grad.f_contiguous()?;
        let (ps, gs) = (cpu::slice::<f32>(weight.master())?, cpu::slice::<f32>(&grad)?);
        let updated = cpu::build(&weight.size(), |out: &mut [f32]| {
            let means = ms.par_iter_mut().zip(&mut vs);
            out.par_iter_mut().zip(ps).zip(gs).zip(means).for_each(|(((out, &p), &g), (m, v))| {
                (*out, *m, *v) = factors.update(p, *m, *v, g, decay);
            });
        });
        weight.master().shallow_clone().f_copy_(&updated)?;
        let key = mix(factors.key.wrapping_add((first_slot + idx) as u32));
        write(mean, &ms, &signed, |idx| mix(key ^ idx as u32) & 0xffff)?;
        write(mean_sq, &vs, &unsigned, |idx| mix(key ^ idx as u32) >> 16)?;
    }
    Ok(())
}

/// The values of a mean.
fn read(mean: &Mean, codes: &Codes) -> flowhn_torch::Result<Vec<f32>> {
    if let Some(absmax) = &mean.absmax {
        let (kept, absmax) = (cpu::slice::<u8>(&mean.values)?, cpu::slice::<f32>(absmax)?);
        let mut values = vec![0.; kept.len()];
        let blocks = values.par_chunks_mut(BLOCK).zip(kept.par_chunks(BLOCK)).zip(absmax);
        blocks.for_each(|((values, kept), &absmax)| codes.decode(kept, absmax, values));
        return Ok(values);
    }
    Ok(match mean.values.kind() {
        Kind::BFloat16 => cpu::slice::<bf16>(&mean.values)?.par_iter().map(|value| value.to_f32()).collect(),
        _ => cpu::slice(&mean.values)?.to_vec(),
    })
}

/// Keeps the values of a mean; `noise` has 16 random bits for each element.
fn write(mean: &Mean, values: &[f32], codes: &Codes, noise: impl Fn(usize) -> u32 + Sync) -> flowhn_torch::Result<()> {
    let shape = mean.values.size();
    let copy = |to: &Tensor, from: &Tensor| to.shallow_clone().f_copy_(from).map(drop);
    if let Some(absmax) = &mean.absmax {
        let mut largest = vec![0.; values.len().div_ceil(BLOCK)];
        let kept = cpu::build(&shape, |kept: &mut [u8]| {
            let blocks = values.par_chunks(BLOCK).zip(kept.par_chunks_mut(BLOCK));
            blocks.zip(&mut largest).for_each(|((values, kept), absmax)| *absmax = codes.encode(values, kept));
        });
        copy(&mean.values, &kept)?;
        return Ok(copy(absmax, &Tensor::from_slice(&largest))?);
    }
    let kept = match mean.values.kind() {
        Kind::BFloat16 => cpu::build(&shape, |kept: &mut [bf16]| {
            let pairs = kept.par_iter_mut().zip(values).enumerate();
            pairs.for_each(|(idx, (kept, &value))| *kept = round_at_random(value, noise(idx)));
        }),
        _ => cpu::from_slice(&shape, values)?,
    };
    Ok(copy(&mean.values, &kept)?)
}
