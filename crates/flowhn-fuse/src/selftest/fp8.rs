//! Splits and merges that are rounded for the projections that read them, against the operations one after the other.

use flowhn_nn::{Activations, Bias, Init, Linear, Params, Residual, RmsNorm};
use flowhn_torch::testing::{Case, noise, same_bits};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use super::{BATCH, part, patterns, routes};
use crate::merge::merge_sums_for;
use crate::{merge_sums, split_norm_tokens};

/// Widths that projections in fp8 take: every form of the kernels, the larger ones for few patterns, since a CPU is slow at them.
const WIDTHS: [i64; 4] = [16, 272, 768, 2048];
const D_OUT: i64 = 32;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, runs) in patterns() {
        for d in WIDTHS.into_iter().filter(|&d| d < 768 || runs.len() == 2) {
            let runs = runs.clone();
            cases.push(Case::new(format!("fp8: there and back, {name}, {d}"), move |device| there(&runs, d, device)));
        }
    }
    cases
}

/// A split with norms, each branch's projection back to the width, and the merge, for three steps, the first of which chooses the scales:
/// outputs, gradients and scales have the same bits whether readers are named or not.
fn there(runs: &[usize], d: i64, device: Device) -> Result<String> {
    let (attn, ssm) = routes(runs, device)?;
    let bf16 = |n: usize, seed: i64, size: f64| {
        (noise(&[BATCH, n as i64, d + 8], seed) * size).to_kind(Kind::BFloat16).to_device(device)
    };
    let run = |are_named: bool| -> Result<Vec<Tensor>> {
        let mut params = Params::new(device, 0);
        let mut root = params.root();
        let mut linear = |name: &str, d_out| Linear::new(&mut root, name, d, d_out, Init::Zeros, Bias::None);
        let (a_proj, s_proj, proj) = (linear("a_proj", d)?, linear("s_proj", d)?, linear("proj", D_OUT)?);
        let norms = [RmsNorm::new(&mut root, "a_norm", d, 1e-6)?, RmsNorm::new(&mut root, "s_norm", d, 1e-6)?];
        for (name, d_out, seed) in [("a_proj.weight", d, 1), ("s_proj.weight", d, 2), ("proj.weight", D_OUT, 3)] {
            params.assign(name, &(noise(&[d_out, d], seed) * 0.05))?;
        }
        params.refresh_bf16_copies()?;
        params.use_fp8(|_| true)?;
        let mut results = Vec::new();
        for step in 0..3 {
            params.begin_fp8_step()?;
            params.zero_grad()?;
            let leaves = [10, 20].map(|seed| bf16(attn.seq_len(), seed + step, 3.).set_requires_grad(true));
            let [x, delta] = [part(&leaves[0], d), part(&leaves[1], d)];
            let readers = if are_named { [Some(&a_proj), Some(&s_proj)] } else { [None, None] };
            let split = split_norm_tokens(&x, Some(&delta), &attn, &ssm, [&norms[0], &norms[1]], readers)?;
            let branch = |tokens: &Tensor, normed: Activations, proj: &Linear| -> Result<Residual> {
                let change = if tokens.numel() > 0 { proj.forward(normed)? } else { tokens.shallow_clone() };
                Ok(Residual { x: tokens.shallow_clone(), change: Some(change) })
            };
            let a = branch(&split.attn_bnd, split.attn_normed, &a_proj)?;
            let s = branch(&split.ssm_bmd, split.ssm_normed, &s_proj)?;
            let merged = match are_named {
                true => merge_sums_for(&proj, &a, &s, &attn, &ssm)?,
                false => merge_sums(&a, &s, &attn, &ssm)?.into(),
            };
            let y = proj.forward(merged)?;
            let like = |x: &Tensor, seed| (noise(&x.size(), seed) * 1e-3).to_kind(Kind::BFloat16).to_device(device);
            let loss = (&y * like(&y, 30)).sum(Kind::Float) + (&split.sum_bld * like(&x, 31)).sum(Kind::Float);
            loss.f_backward()?;
            results.push(y.detach());
            results.extend(leaves.iter().map(Tensor::grad));
            let grads = params.iter().map(|param| param.weight.master().grad());
            results.extend(grads.filter(Tensor::defined).map(|grad| grad.copy()));
            results.extend(params.fp8_scales().map(|scales| scales.copy()));
        }
        Ok(results)
    };
    let (named, unnamed) = (run(true)?, run(false)?);
    match (0..named.len()).find(|&i| !same_bits(&named[i], &unnamed[i])) {
        None if named.len() == unnamed.len() => Ok(format!("{} results, the same bits", named.len())),
        differs => Err(Error::invalid("fp8", format!("result {differs:?} of {} differs", named.len()))),
    }
}
