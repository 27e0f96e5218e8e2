//! Projections whose products are taken in 8-bit floats, and what rounds for them.
// r rows, i width in, o width out

use flowhn_nn::{Bias, Init, Linear, Params, RmsNorm};
use flowhn_torch::Result;
use tch::{Device, Kind, Tensor};

use super::operation::Direction::{Backward, Forward};
use super::operation::{Call, Operation, Pass, leaf, random};

const BF16: Kind = Kind::BFloat16;
const EPS: f64 = 1e-6;
pub(super) const WEIGHTS: Init = Init::Normal { std: 0.02 };

/// The table's lines; `tiny` makes the sizes small enough to try them on a CPU.
pub fn operations(tiny: bool) -> Vec<Operation> {
    let size = |n: i64, small: i64| if tiny { small } else { n };
    let (r, d) = (size(8192, 24), size(2048, 32));
    let mut all = vec![cast(r, d), cast(r, size(8512, 48)), residual_norm(r, d), gated_norm(r, size(4096, 32))];
    for [i, o] in [[2048, 3072], [2048, 2048], [2048, 8512], [4096, 2048]] {
        all.push(linear([r, size(i, 32), size(o, 48)]));
    }
    all
}

/// A projection from `i` to `o` whose scales have been chosen, and its parameters.
fn projection(r: i64, i: i64, o: i64, device: Device) -> Result<(Params, Linear)> {
    let mut params = Params::new(device, 0);
    let proj = Linear::new(&mut params.root(), "proj", i, o, WEIGHTS, Bias::None)?;
    begin(&mut params, &leaf(&[r, i], BF16, device, 1)?, |x| proj.forward(x))?;
    Ok((params, proj))
}

/// Takes all products in fp8; a first step sees what the scales follow from.
pub(super) fn begin(params: &mut Params, x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
    params.refresh_bf16_copies()?;
    params.use_fp8(|_| true)?;
    params.begin_fp8_step()?;
    f(x)?.f_sum(Kind::Float)?.f_backward()?;
    params.begin_fp8_step()
}

fn cast(r: i64, d: i64) -> Operation {
    Operation {
        op: "fp8_cast",
        shape: format!("{r}x{d}"),
        // bf16 to bytes in both orders.
        passes: vec![Pass::new(Forward, (4 * r * d) as f64, 0.)],
        build: Box::new(move |device| {
            let (_params, proj) = projection(r, d, 16, device)?;
            let run = move |t: &[Tensor]| match proj.fp8_place(&t[0].size(), BF16)? {
                Some(place) => Ok(vec![place.fill(&t[0])?]),
                None => unreachable!("the scale has been chosen"),
            };
            Ok(Call { leaves: vec![random(&[r, d], BF16, device, 1)?], run: Box::new(run) })
        }),
    }
}

fn residual_norm(r: i64, d: i64) -> Operation {
    Operation {
        op: "residual_norm to fp8",
        shape: format!("{r}x{d}"),
        // Two terms and their sum; bytes in both orders.
        passes: vec![Pass::new(Forward, (8 * r * d) as f64, 0.)],
        build: Box::new(move |device| {
            let (mut params, proj) = projection(r, d, 16, device)?;
            let norm = RmsNorm::new(&mut params.root(), "norm", d, EPS)?;
            let leaves = vec![leaf(&[r, d], BF16, device, 1)?, leaf(&[r, d], BF16, device, 2)?];
            let run = move |t: &[Tensor]| {
                let (sum, normed) = norm.forward_residual_for(&proj, &t[0], Some(&t[1]))?;
                Ok(vec![sum, normed.tensor().shallow_clone()])
            };
            Ok(Call { leaves, run: Box::new(run) })
        }),
    }
}

fn gated_norm(r: i64, d: i64) -> Operation {
    Operation {
        op: "gated_rms_norm to fp8",
        shape: format!("{r}x{d}"),
        passes: vec![Pass::new(Forward, (6 * r * d) as f64, 0.)],
        build: Box::new(move |device| {
            let (mut params, proj) = projection(r, d, 16, device)?;
            let norm = RmsNorm::new(&mut params.root(), "norm", d, EPS)?;
            let leaves = vec![leaf(&[r, d], BF16, device, 1)?, leaf(&[r, d], BF16, device, 2)?];
            let run =
                move |t: &[Tensor]| Ok(vec![norm.forward_gated_for(&proj, &t[0], &t[1], 1)?.tensor().shallow_clone()]);
            Ok(Call { leaves, run: Box::new(run) })
        }),
    }
}

/// Rounding and products. Those in fp8 are twice as fast as those in bf16, whose rate floors are told by, so their FLOPs count half.
fn linear([r, i, o]: [i64; 3]) -> Operation {
    let flops = (r * i * o) as f64;
    let [x, w, y] = [r * i, o * i, r * o].map(|n| n as f64);
    Operation {
        op: "linear in fp8",
        shape: format!("{r}x{i} to {o}"),
        // The rounded activation is kept; back, both gradients are in bf16 and that of the weight in f32.
        passes: vec![
            Pass::new(Forward, 4. * x + w + 2. * y, flops),
            Pass::new(Backward, 2. * y + x + w + 2. * x + 4. * w, 2. * flops),
        ],
        build: Box::new(move |device| {
            let (_params, proj) = projection(r, i, o, device)?;
            let leaves = vec![leaf(&[r, i], BF16, device, 1)?, proj.weight().master().shallow_clone()];
            Ok(Call { leaves, run: Box::new(move |t| Ok(vec![proj.forward(&t[0])?])) })
        }),
    }
}
