//! Norms that are rounded for the projection that reads them, against the norm and the projection one after the other.

use flowhn_torch::testing::{Case, noise, same_bits};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use super::ensure;
use crate::{Activations, Bias, Init, Linear, Params, RmsNorm, SwiGluMlp};

const BATCH: i64 = 2;
/// Tokens of a sequence, and widths: rows that fill blocks and that do not, every form of the kernels, and rows too wide for them.
const SHAPES: [[i64; 2]; 8] = [[1, 16], [7, 48], [16, 128], [33, 272], [50, 768], [64, 1024], [100, 2048], [9, 4112]];
const D_OUT: i64 = 32;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for [n, d] in SHAPES {
        for (op, n_groups) in [("residual_norm", 0), ("gated_rms_norm", 1), ("gated_rms_norm in two groups", 2)] {
            if n_groups != 2 || d % 16 == 0 {
                let name = format!("fp8: {op} for a projection, {BATCH} x {n} x {d}");
                cases.push(Case::new(name, move |device| norms(n, d, n_groups, 8, device)));
            }
        }
    }
    cases.push(Case::new("fp8: a norm of rows that no vector fits", |device| norms(20, 64, 0, 3, device)));
    cases.push(Case::new("fp8: activations have one reader", one_reader));
    cases
}

struct Layers {
    params: Params,
    norm: RmsNorm,
    proj: Linear,
    mlp: SwiGluMlp,
}

fn layers(d: i64, device: Device) -> Result<Layers> {
    let mut params = Params::new(device, 0);
    let norm = RmsNorm::new(&mut params.root(), "norm", d, 1e-6)?;
    let proj = Linear::new(&mut params.root(), "proj", d, D_OUT, Init::Zeros, Bias::None)?;
    let mlp = SwiGluMlp::new(&mut params.root().push("mlp"), d, 48, Init::Zeros, Init::Zeros, &Bias::None)?;
    params.assign("norm.weight", &(noise(&[d], 1) * 0.5 + 1.))?;
    params.assign("proj.weight", &(noise(&[D_OUT, d], 2) * 0.05))?;
    params.assign("mlp.gate_up_proj.weight", &(noise(&[96, d], 3) * 0.2))?;
    params.assign("mlp.down_proj.weight", &(noise(&[d, 48], 4) * 0.1))?;
    params.refresh_bf16_copies()?;
    params.use_fp8(|_| true)?;
    Ok(Layers { params, norm, proj, mlp })
}

/// Three steps, the first of which chooses the scales: outputs, gradients and scales have the same bits. `n_groups` is 0 for the norm of a
/// sum; `offset` elements are before each row.
fn norms(n: i64, d: i64, n_groups: i64, offset: i64, device: Device) -> Result<String> {
    let wide = |seed: i64| {
        let x = (noise(&[BATCH, n, d + 8], seed) * 3.).to_kind(Kind::BFloat16).to_device(device);
        x.narrow(2, offset, d)
    };
    let like = |x: &Tensor, seed| (noise(&x.size(), seed) * 1e-3).to_kind(Kind::BFloat16).to_device(device);
    let run = |is_rounded_there: bool| -> Result<Vec<Tensor>> {
        let Layers { params, norm, proj, mlp } = layers(d, device)?;
        let mut results = Vec::new();
        for step in 0..3 {
            params.begin_fp8_step()?;
            params.zero_grad()?;
            let leaves = [wide(10 + step), wide(20 + step)].map(|x| x.detach().set_requires_grad(true));
            let [x, other] = [&leaves[0], &leaves[1]];
            let outputs = match (n_groups, is_rounded_there) {
                (0, true) => {
                    let (sum, normed) = norm.forward_residual_for(&proj, x, Some(other))?;
                    ensure(normed.values().is_err() == (step > 0), || format!("step {step} went another way"))?;
                    let (again, for_mlp) = norm.forward_residual_for(mlp.gate_up_proj(), &sum, None)?;
                    vec![proj.forward(normed)?, mlp.forward(for_mlp)?, again]
                }
                (0, false) => {
                    let (sum, normed) = norm.forward_residual(x, Some(other))?;
                    let (again, for_mlp) = norm.forward_residual(&sum, None)?;
                    vec![proj.forward(&normed)?, mlp.forward(&for_mlp)?, again]
                }
                (_, true) => vec![proj.forward(norm.forward_gated_for(&proj, x, other, n_groups)?)?],
                (_, false) => vec![proj.forward(&norm.forward_gated(x, other, n_groups)?)?],
            };
            let terms = outputs.iter().zip(30..).map(|(y, seed)| (y * like(y, seed)).sum(Kind::Float));
            terms.reduce(|a, b| a + b).ok_or_else(|| Error::invalid("fp8", "no output"))?.f_backward()?;
            results.extend(outputs.iter().map(Tensor::detach));
            results.extend(leaves.iter().map(Tensor::grad));
            let grads = params.iter().map(|param| param.weight.master().grad());
            results.extend(grads.filter(Tensor::defined).map(|grad| grad.copy()));
            results.extend(params.fp8_scales().map(|scales| scales.copy()));
        }
        Ok(results)
    };
    let (there, apart) = (run(true)?, run(false)?);
    let differs = (0..there.len()).find(|&i| !same_bits(&there[i], &apart[i]));
    ensure(differs.is_none() && there.len() == apart.len(), || format!("result {differs:?} differs"))?;
    Ok(format!("{} results, the same bits", there.len()))
}

/// What was rounded for one projection is no use to another, and none without fp8.
fn one_reader(device: Device) -> Result<String> {
    let Layers { params, norm, proj, mlp } = layers(32, device)?;
    let x = noise(&[BATCH, 5, 32], 1).to_kind(Kind::BFloat16).to_device(device);
    params.begin_fp8_step()?;
    let rounded = || -> Result<Activations> { Ok(norm.forward_residual_for(&proj, &x, None)?.1) };
    let first = proj.forward(rounded()?)?;
    ensure(mlp.forward(rounded()?).is_err(), || "another projection read it".to_owned())?;
    let activations = rounded()?;
    let isnan = activations.tensor().isnan().all();
    ensure(isnan.int64_value(&[]) == 1, || "what stands in for the values looks like values".to_owned())?;
    let paused = params.pause_fp8();
    ensure(proj.forward(&activations).is_err(), || "a product in bf16 read it".to_owned())?;
    drop(paused);
    ensure(same_bits(&first, &proj.forward(&activations)?), || "two products differ".to_owned())?;
    Ok("and no other".to_owned())
}
