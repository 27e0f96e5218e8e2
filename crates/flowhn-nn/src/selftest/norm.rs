//! The norms against their formulas.

use flowhn_torch::testing::{Case, Rule, check_replay, noise, same_bits};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::{gated_rms_norm, reference, residual_norm, rms_norm};

/// Widths on both sides of what a vector, a warp and a team hold; rows from none to more than a block takes.
const SHAPES: [[i64; 2]; 12] = [
    [0, 16],
    [31, 1],
    [31, 7],
    [1000, 67],
    [1, 128],
    [1000, 128],
    [1000, 768],
    [31, 1536],
    [31, 2048],
    [1, 4097],
    [31, 4097],
    [3, 9000],
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("rms_norm: more than 2^31 elements", huge).alone(),
        Case::new("rms_norm: doubles are refused where no kernel takes them", doubles),
        Case::new("rms_norm: zero, tiny and large rows stay finite", extremes),
    ];
    for [n, d] in SHAPES {
        for kind in [Kind::Float, Kind::BFloat16] {
            let name = |op: &str| format!("{op}: {n} x {d}, {kind:?}");
            cases.push(Case::new(name("rms_norm"), move |device| plain(&[n, d], kind, device)));
            cases.push(Case::new(name("residual_norm"), move |device| residual(&[n, d], kind, device)));
            for n_groups in [1, 2].into_iter().filter(|n_groups| d % n_groups == 0) {
                let name = format!("gated_rms_norm: {n} x {d} in {n_groups} groups, {kind:?}");
                cases.push(Case::new(name, move |device| gated(&[n, d], n_groups, kind, device)));
            }
        }
    }
    for kind in [Kind::Float, Kind::BFloat16] {
        for op in [Op::Plain, Op::Residual, Op::Gated] {
            let name = format!("{}: extreme rows stay finite, {kind:?}", op.name());
            cases.push(Case::new(name, move |device| extreme_rows(op, kind, device)));
        }
        // Many for a CPU.
        let shape = [65_536, 256];
        let name = |op: Op| format!("{}: {} x {}, {kind:?}", op.name(), shape[0], shape[1]);
        cases.push(Case::on_cuda(name(Op::Plain), move |device| plain(&shape, kind, device)));
        cases.push(Case::on_cuda(name(Op::Residual), move |device| residual(&shape, kind, device)));
        cases.push(Case::on_cuda(name(Op::Gated), move |device| gated(&shape, 1, kind, device)));
        let name = format!("norms: replayed from a CUDA graph, {kind:?}");
        cases.push(Case::on_cuda(name, move |device| replays(kind, device)));
        for width in [40, 128] {
            let name = format!("norms: views of a wider tensor, gradients of a transposed one, {width}, {kind:?}");
            cases.push(Case::new(name, move |device| strided(width, kind, device)));
        }
    }
    cases
}

/// A small `eps` would leave nothing but rounding of the gradient of very short rows.
fn eps(d: i64) -> f64 {
    if d < 8 { 0.1 } else { 1e-6 }
}

fn weight(d: i64) -> Tensor {
    noise(&[d], 2) * 0.5 + 1.
}

/// Activations are of this kind, a weight beside them is f32.
fn kinds(inputs: &[Tensor], kind: Kind) -> Vec<Kind> {
    inputs.iter().map(|input| if input.dim() == 1 { Kind::Float } else { kind }).collect()
}

fn check(
    kernel: &dyn Fn(&[Tensor]) -> Result<Vec<Tensor>>,
    formula: &dyn Fn(&[Tensor]) -> Result<Vec<Tensor>>,
    inputs: &[Tensor],
    kind: Kind,
    device: Device,
) -> Result<String> {
    Rule { kernel, plain: formula, floor: Rule::floor_of(kind) }.check(inputs, &kinds(inputs, kind), device)
}

fn plain(shape: &[i64], kind: Kind, device: Device) -> Result<String> {
    let (d, eps) = (shape[1], eps(shape[1]));
    let kernel = |x: &[Tensor]| Ok(vec![rms_norm(&x[0], &x[1], eps)?]);
    let formula = |x: &[Tensor]| Ok(vec![reference::rms_norm(&x[0], &x[1], eps)]);
    check(&kernel, &formula, &[noise(shape, 1) * 3., weight(d)], kind, device)
}

/// The sum is computed in f32 and rounded before the norm reads it, which rounds as addition in that dtype does.
fn residual(shape: &[i64], kind: Kind, device: Device) -> Result<String> {
    let (d, eps) = (shape[1], eps(shape[1]));
    let kernel = |x: &[Tensor]| {
        let (sum, normed) = residual_norm(&x[0], Some(&x[2]), &x[1], eps)?;
        // The same again without an addend: the sum is then handed on.
        let (sum, again) = residual_norm(&sum, None, &x[1], eps)?;
        Ok(vec![sum, normed, again])
    };
    let formula = |x: &[Tensor]| {
        let sum = &x[0] + &x[2];
        let normed = reference::rms_norm(&sum, &x[1], eps);
        let again = reference::rms_norm(&sum, &x[1], eps);
        Ok(vec![sum, normed, again])
    };
    check(&kernel, &formula, &[noise(shape, 1) * 3., weight(d), noise(shape, 3)], kind, device)
}

fn gated(shape: &[i64], n_groups: i64, kind: Kind, device: Device) -> Result<String> {
    let eps = eps(shape[1] / n_groups);
    let kernel = |x: &[Tensor]| Ok(vec![gated_rms_norm(&x[0], &x[2], &x[1], eps, n_groups)?]);
    let formula = |x: &[Tensor]| Ok(vec![reference::gated_rms_norm(&x[0], &x[2], &x[1], eps, n_groups)]);
    check(&kernel, &formula, &[noise(shape, 1) * 3., weight(shape[1]), noise(shape, 3) * 4.], kind, device)
}

fn strided(d: i64, kind: Kind, device: Device) -> Result<String> {
    let view = |x: &Tensor| x.narrow(2, 8, d).transpose(0, 1);
    let kernel = |x: &[Tensor]| {
        let (a, b) = (view(&x[0]), view(&x[2]));
        let (sum, normed) = residual_norm(&a, Some(&b), &x[1], 1e-6)?;
        let outputs = [rms_norm(&a, &x[1], 1e-6)?, sum, normed, gated_rms_norm(&a, &b, &x[1], 1e-6, 2)?];
        Ok(outputs.iter().map(|out| out.transpose(0, 1)).collect())
    };
    let formula = |x: &[Tensor]| {
        let (a, b) = (view(&x[0]), view(&x[2]));
        let sum = &a + &b;
        let normed = reference::rms_norm(&sum, &x[1], 1e-6);
        let gated = reference::gated_rms_norm(&a, &b, &x[1], 1e-6, 2);
        let outputs = [reference::rms_norm(&a, &x[1], 1e-6), sum, normed, gated];
        Ok(outputs.iter().map(|out| out.transpose(0, 1)).collect())
    };
    let wide = [5, 9, 2 * d + 8];
    check(&kernel, &formula, &[noise(&wide, 1) * 2., weight(d), noise(&wide, 3) * 2.], kind, device)
}

/// Rows far into a tensor against the same rows alone.
fn huge(device: Device) -> Result<String> {
    let (n, d, part) = (if device.is_cuda() { 2_900_000 } else { 3000 }, 768, 1000);
    let x = noise(&[part, d], 1).to_kind(Kind::BFloat16).to_device(device).repeat([n / part, 1]);
    let weight = weight(d).to_kind(Kind::Float).to_device(device);
    let run = |x: Tensor| -> Result<[Tensor; 2]> {
        let x = x.set_requires_grad(true);
        let y = rms_norm(&x, &weight, 1e-6)?;
        let dx = Tensor::f_run_backward(&[y.sum(Kind::Float)], &[&x], false, false)?.swap_remove(0);
        Ok([y.detach(), dx])
    };
    let alone = run(x.narrow(0, n - part, part).copy())?;
    for (all, alone) in run(x.shallow_clone())?.iter().zip(&alone) {
        if !same_bits(&all.narrow(0, n - part, part), alone) {
            return Err(Error::invalid("huge", "the last rows differ from the same rows alone".to_owned()));
        }
    }
    Ok(format!("{} elements", x.numel()))
}

fn doubles(device: Device) -> Result<String> {
    let (x, w) = (Tensor::ones([2, 3], (Kind::Double, device)), Tensor::ones([3], (Kind::Double, device)));
    match (rms_norm(&x, &w, 0.), device) {
        (Ok(_), Device::Cpu) => Ok("computed".to_owned()),
        (Err(Error::Dtype { arg: "x", want, .. }), Device::Cuda(_)) => Ok(format!("refused, wanted {want}")),
        (outcome, _) => Err(Error::invalid("doubles", format!("got {outcome:?}"))),
    }
}

fn extremes(device: Device) -> Result<String> {
    let x = Tensor::from_slice(&[0f32, 0., 1e18, -1e18, 1e-30, 0.]).view([3, 2]).to_device(device);
    let (x, weight) = (x.set_requires_grad(true), Tensor::ones([2], (Kind::Float, device)).set_requires_grad(true));
    let y = rms_norm(&x, &weight, 1e-6)?;
    let grads = Tensor::f_run_backward(&[y.sum(Kind::Float)], &[&x, &weight], false, false)?;
    for (name, tensor) in [("y", &y.detach()), ("dx", &grads[0]), ("dweight", &grads[1])] {
        let finite = tensor.isfinite().all().int64_value(&[]) == 1;
        if !finite {
            return Err(Error::invalid("extremes", format!("{name} is not finite: {tensor:?}")));
        }
    }
    Ok(String::new())
}

/// A norm of rows.
#[derive(Clone, Copy, PartialEq)]
enum Op {
    Plain,
    Residual,
    Gated,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "rms_norm",
            Self::Residual => "residual_norm",
            Self::Gated => "gated_rms_norm",
        }
    }
}

/// Rows of one size each, of which the squares are too small or almost too large for f32, beside gates of every size.
fn extreme_rows(op: Op, kind: Kind, device: Device) -> Result<String> {
    let n_groups = 2;
    let kernel = |x: &[Tensor]| match op {
        Op::Plain => Ok(vec![rms_norm(&x[0], &x[1], 1e-6)?]),
        Op::Residual => residual_norm(&x[0], Some(&x[2]), &x[1], 1e-6).map(|(sum, normed)| vec![sum, normed]),
        Op::Gated => Ok(vec![gated_rms_norm(&x[0], &x[2], &x[1], 1e-6, n_groups)?]),
    };
    let formula = |x: &[Tensor]| match op {
        Op::Plain => Ok(vec![reference::rms_norm(&x[0], &x[1], 1e-6)]),
        Op::Residual => {
            let sum = &x[0] + &x[2];
            let normed = reference::rms_norm(&sum, &x[1], 1e-6);
            Ok(vec![sum, normed])
        }
        Op::Gated => Ok(vec![reference::gated_rms_norm(&x[0], &x[2], &x[1], 1e-6, n_groups)]),
    };
    let rule = Rule { kernel: &kernel, plain: &formula, floor: Rule::floor_of(kind) };
    // Of gates, or of what is added.
    let others: &[f64] = if op == Op::Plain { &[1.] } else { &[1e-20, 1., 100., 1e4] };
    let mut found = String::new();
    for &gate in others {
        for size in [0., 1e-30, 1e-4, 1e4, 1e14] {
            let inputs = [noise(&[5, 136], 1) * size, weight(136), noise(&[5, 136], 3) * gate];
            found = rule
                .check_extremes(&inputs, &kinds(&inputs, kind), device)
                .map_err(|error| Error::invalid("extremes", format!("rows of {size} beside {gate}: {error}")))?;
        }
    }
    Ok(found)
}

fn replays(kind: Kind, device: Device) -> Result<String> {
    let norms = |x: &[Tensor]| {
        let (sum, normed) = residual_norm(&x[0], Some(&x[2]), &x[1], 1e-6)?;
        Ok(vec![rms_norm(&x[0], &x[1], 1e-6)?, sum, normed, gated_rms_norm(&x[0], &x[2], &x[1], 1e-6, 2)?])
    };
    let inputs = [noise(&[300, 768], 1) * 3., weight(768), noise(&[300, 768], 3)];
    check_replay(&norms, &inputs, &kinds(&inputs, kind), device)
}
