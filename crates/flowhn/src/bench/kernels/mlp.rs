//! Gated MLPs with their products.
// r rows, d d_model, f d_ff

use flowhn_nn::{Bias, Params, SwiGluMlp};
use tch::Kind;

use super::fp8::{WEIGHTS, begin};
use super::operation::Direction::{Backward, Forward};
use super::operation::{Call, Operation, Pass, leaf};

const BF16: Kind = Kind::BFloat16;

/// The table's lines; `tiny` makes the sizes small enough to try them on a CPU.
pub fn operations(tiny: bool) -> Vec<Operation> {
    let size = |n: i64, small: i64| if tiny { small } else { n };
    let mlps = [([8192, 2048, 5632], false), ([16_384, 1024, 2816], false), ([8192, 2048, 5632], true)];
    mlps.map(|([r, d, f], in_fp8)| mlp([size(r, 24), size(d, 32), size(f, 48)], in_fp8)).into()
}

fn mlp([r, d, f]: [i64; 3], in_fp8: bool) -> Operation {
    let [x, w, h] = [r * d, d * f, r * f].map(|n| n as f64);
    // FLOPs of a product in bf16: one in fp8 takes half the time. Gradients of weights are f32, gate and up are kept in bf16.
    let (flops, [forward, backward]) = match in_fp8 {
        false => (6. * r as f64 * w, [4. * x + 6. * w + 8. * h, 6. * x + 18. * w + 14. * h]),
        true => (3. * r as f64 * w, [6. * x + 3. * w + 6. * h, 5. * x + 15. * w + 5. * h]),
    };
    Operation {
        op: if in_fp8 { "mlp in fp8" } else { "mlp" },
        shape: format!("{r}x{d} through {f}"),
        passes: vec![Pass::new(Forward, forward, flops), Pass::new(Backward, backward, 2. * flops)],
        build: Box::new(move |device| {
            let mut params = Params::new(device, 0);
            let mlp = SwiGluMlp::new(&mut params.root(), d, f, WEIGHTS, WEIGHTS, &Bias::None)?;
            match in_fp8 {
                true => begin(&mut params, &leaf(&[r, d], BF16, device, 1)?, |x| mlp.forward(x))?,
                false => params.refresh_bf16_copies()?,
            }
            let [gate_up, down] =
                [mlp.gate_up_proj(), mlp.down_proj()].map(|proj| proj.weight().master().shallow_clone());
            let leaves = vec![leaf(&[r, d], BF16, device, 1)?, gate_up, down];
            Ok(Call { leaves, run: Box::new(move |t| Ok(vec![mlp.forward(&t[0])?])) })
        }),
    }
}
