//! The linear map of one token against its formula.

use flowhn_torch::Result;
use flowhn_torch::testing::{Case, Rule, noise};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{Weight, linear};

/// Widths of the result and of the token.
const SHAPES: [[i64; 2]; 8] =
    [[1, 8], [7, 264], [1152, 768], [768, 2048], [333, 5632], [65_536, 768], [9, 20], [64, 1]];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [Kind::Float, Kind::BFloat16] {
        for [d_out, d_in] in SHAPES {
            let name = format!("linear: one token, {d_out} x {d_in}, {kind:?}");
            cases.push(Case::new(name, move |device| check(d_out, d_in, kind, device)));
        }
    }
    cases
}

fn check(d_out: i64, d_in: i64, kind: Kind, device: Device) -> Result<String> {
    let kernel = |x: &[Tensor]| {
        let weight = Weight::new(x[1].detach().to_kind(Kind::Float));
        // A view with room around it, as a piece of a wider projection has.
        let wide = Tensor::cat(&[&x[0], &x[0]], -1).narrow(-1, 0, d_in);
        no_grad(|| Ok(vec![linear(&wide, &weight)?]))
    };
    let plain = |x: &[Tensor]| Ok(vec![x[0].detach().matmul(&x[1].detach().tr())]);
    let inputs = [noise(&[1, 1, d_in], 1), noise(&[d_out, d_in], 2)];
    Rule { kernel: &kernel, plain: &plain, floor: Rule::floor_of(kind) }.check(&inputs, &[kind; 2], device)
}
