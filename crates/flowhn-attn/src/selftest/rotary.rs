//! Rotary embedding against its formula.

use flowhn_torch::Result;
use flowhn_torch::testing::{Case, Rule, check_replay, noise};
use tch::{Device, Kind, Tensor};

use crate::{RotaryTable, rotary};

/// Batch, tokens, heads, features of a head.
const SHAPES: [[i64; 4]; 9] = [
    [2, 31, 3, 64],
    [1, 200, 15, 128],
    [2, 3, 1, 2],
    [3, 1, 2, 6],
    [2, 64, 12, 20],
    [1, 5, 80, 64],
    [2, 0, 3, 8],
    [2, 4096, 3, 64],
    [8, 1000, 2, 64],
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for shape in SHAPES {
        for kind in [Kind::Float, Kind::BFloat16] {
            let name = format!("rotary: {shape:?}, {kind:?}");
            cases.push(Case::new(name, move |device| check(shape, kind, device)));
        }
    }
    for kind in [Kind::Float, Kind::BFloat16] {
        // Long for a CPU.
        let shape = [1, 65_536, 3, 64];
        cases.push(Case::on_cuda(format!("rotary: {shape:?}, {kind:?}"), move |device| check(shape, kind, device)));
        let name = format!("rotary: replayed from a CUDA graph, {kind:?}");
        cases.push(Case::on_cuda(name, move |device| replays(kind, device)));
    }
    cases
}

fn check(shape: [i64; 4], kind: Kind, device: Device) -> Result<String> {
    let [batch, n, heads, width] = shape;
    let positions: Vec<i64> = (0..n).map(|i| i * i + 3).collect();
    let table = RotaryTable::new(&positions, width, 10_000., device)?;
    // Queries and keys are parts of one projection, as in the mixer, and so have gaps between tokens.
    let part = |x: &Tensor| x.narrow(2, 1, heads);
    let kernel = |x: &[Tensor]| Ok(vec![rotary(&part(&x[0]), &table)?.transpose(1, 2)]);
    let plain = |x: &[Tensor]| {
        let wide = if x[0].kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let halves = part(&x[0]).to_kind(wide).chunk(2, -1);
        let (cos, sin) = table.parts();
        let (cos, sin) = (cos.unsqueeze(1).to_kind(wide), sin.unsqueeze(1).to_kind(wide));
        let first = &halves[0] * &cos - &halves[1] * &sin;
        let second = &halves[1] * &cos + &halves[0] * &sin;
        Ok(vec![Tensor::cat(&[first, second], -1).to_kind(x[0].kind()).transpose(1, 2)])
    };
    let inputs = [noise(&[batch, n, heads + 2, width], 1) * 2.];
    Rule { kernel: &kernel, plain: &plain, floor: Rule::floor_of(kind) }.check(&inputs, &[kind], device)
}

fn replays(kind: Kind, device: Device) -> Result<String> {
    let positions: Vec<i64> = (0..200).collect();
    let table = RotaryTable::new(&positions, 64, 10_000., device)?;
    check_replay(&|x| Ok(vec![rotary(&x[0], &table)?]), &[noise(&[2, 200, 3, 64], 1)], &[kind], device)
}
