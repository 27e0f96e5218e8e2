//! SwiGLU against its formula.

use flowhn_torch::Result;
use flowhn_torch::testing::{Case, Rule, check_replay, noise};
use tch::{Device, Kind, Tensor};

use crate::{reference, swiglu};

/// Rows, and half the width of `gate_up`.
const SHAPES: [[i64; 2]; 8] = [[0, 8], [31, 1], [1, 7], [1000, 67], [31, 128], [1000, 768], [31, 2048], [3, 4097]];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [Kind::Float, Kind::BFloat16] {
        for [n, f] in SHAPES {
            let name = format!("swiglu: {n} x {f}, {kind:?}");
            cases.push(Case::new(name, move |device| check(&[n, 1, 2 * f], |x| x.shallow_clone(), kind, device)));
        }
        // Many for a CPU.
        let name = format!("swiglu: 65536 x 256, {kind:?}");
        cases.push(Case::on_cuda(name, move |device| check(&[65_536, 1, 512], |x| x.shallow_clone(), kind, device)));
        let view = |x: &Tensor| x.narrow(2, 8, 64).transpose(0, 1);
        let name = format!("swiglu: a view of a wider tensor, {kind:?}");
        cases.push(Case::new(name, move |device| check(&[5, 9, 80], view, kind, device)));
        let name = format!("swiglu: extreme gates stay finite, {kind:?}");
        cases.push(Case::new(name, move |device| extremes(kind, device)));
        let name = format!("swiglu: replayed from a CUDA graph, {kind:?}");
        cases.push(Case::on_cuda(name, move |device| {
            check_replay(&|x| Ok(vec![swiglu(&x[0])?]), &[noise(&[31, 512], 1) * 6.], &[kind], device)
        }));
        let name = format!("swiglu: a view that no vector fits, {kind:?}");
        let odd = |x: &Tensor| x.narrow(2, 3, 64).transpose(0, 1);
        cases.push(Case::new(name, move |device| check(&[5, 9, 75], odd, kind, device)));
    }
    cases
}

fn check(shape: &[i64], view: fn(&Tensor) -> Tensor, kind: Kind, device: Device) -> Result<String> {
    let kernel = |x: &[Tensor]| Ok(vec![swiglu(&view(&x[0]))?.transpose(0, 1)]);
    let plain = |x: &[Tensor]| Ok(vec![reference::swiglu(&view(&x[0])).transpose(0, 1)]);
    Rule { kernel: &kernel, plain: &plain, floor: Rule::floor_of(kind) }.check(&[noise(shape, 1) * 6.], &[kind], device)
}

/// Gates where the sigmoid is 0 or 1 and its exponential too large for f32, beside values of every size.
fn extremes(kind: Kind, device: Device) -> Result<String> {
    let kernel = |x: &[Tensor]| Ok(vec![swiglu(&Tensor::cat(&[&x[0], &x[1]], -1))?]);
    let plain = |x: &[Tensor]| Ok(vec![reference::swiglu(&Tensor::cat(&[&x[0], &x[1]], -1))]);
    let rule = Rule { kernel: &kernel, plain: &plain, floor: Rule::floor_of(kind) };
    let mut found = String::new();
    for (gate, up) in [(0., 1e30), (1e-30, 1.), (100., 1.), (1e4, 1e30), (1e18, 1e18), (1e37, 1e-30)] {
        let inputs = [noise(&[31, 72], 1) * gate, noise(&[31, 72], 2) * up];
        found = rule.check_extremes(&inputs, &[kind; 2], device)?;
    }
    Ok(found)
}
