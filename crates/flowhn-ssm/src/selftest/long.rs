//! Long sequences and tensors of more than 2^31 elements.

use flowhn_torch::testing::{Case, Outcome, Rule, max_rel, noise};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::{CausalConv1d, SelectiveScan, Ssd, causal_conv1d, selective_scan, ssd};

/// An operation on inputs in a fixed order.
type Op = fn(&[Tensor]) -> Result<Vec<Tensor>>;

/// One operation with the shapes of its inputs: `l` stands for the length, the first axis is the batch where `batched`.
struct Subject {
    name: &'static str,
    op: Op,
    inputs: fn(batch: i64, seq_len: i64, width: i64) -> Vec<Input>,
}

struct Input {
    shape: Vec<i64>,
    /// f32 whatever the activations are.
    wide: bool,
    batched: bool,
    /// Values are `shift + scale * noise`, with noise in -1..1.
    shift: f64,
    scale: f64,
}

fn activation(shape: &[i64]) -> Input {
    Input { shape: shape.to_vec(), wide: false, batched: true, shift: 0., scale: 1. }
}

fn weight(shape: &[i64], shift: f64, scale: f64) -> Input {
    Input { shape: shape.to_vec(), wide: true, batched: false, shift, scale }
}

const SUBJECTS: [Subject; 3] = [
    Subject {
        name: "causal_conv1d",
        op: |x| {
            let out = causal_conv1d(&CausalConv1d { bias_e: Some(&x[2]), ..CausalConv1d::new(&x[0], &x[1]) })?;
            Ok(vec![out.y_ble])
        },
        inputs: |b, l, e| vec![activation(&[b, l, e]), weight(&[e, 4], 0., 0.5), weight(&[e], 0., 0.5)],
    },
    Subject {
        name: "selective_scan",
        op: |x| {
            let out = selective_scan(&SelectiveScan {
                z_ble: Some(&x[5]),
                d_e: Some(&x[6]),
                dt_bias_e: Some(&x[7]),
                ..SelectiveScan::new(&x[0], &x[1], &x[2], &x[3], &x[4])
            })?;
            Ok(vec![out.y_ble])
        },
        inputs: |b, l, e| {
            let (a, d) = (weight(&[e, 16], -2., 1.9), weight(&[e], 1., 0.5));
            let (b_bln, c_bln) = (activation(&[b, l, 16]), activation(&[b, l, 16]));
            let x = || activation(&[b, l, e]);
            vec![x(), x(), a, b_bln, c_bln, x(), d, weight(&[e], -3., 1.)]
        },
    },
    Subject {
        name: "ssd",
        op: |x| {
            let x_blhp = x[0].unflatten(2, [-1, 64]);
            let out = ssd(&Ssd {
                d_h: Some(&x[5]),
                dt_bias_h: Some(&x[6]),
                ..Ssd::new(&x_blhp, &x[1], &x[2], &x[3], &x[4])
            })?;
            Ok(vec![out.y_blhp])
        },
        inputs: |b, l, e| {
            let h = e / 64;
            let bc = || activation(&[b, l, 1, 128]);
            let (a, d, bias) = (weight(&[h], -2., 1.9), weight(&[h], 1., 0.5), weight(&[h], -3., 1.));
            vec![activation(&[b, l, e]), activation(&[b, l, h]), a, bc(), bc(), d, bias]
        },
    },
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for subject in &SUBJECTS {
        for seq_len in [4096, 65536] {
            for kind in [Kind::Float, Kind::BFloat16] {
                let name = format!("{}: {seq_len} tokens, {kind:?}", subject.name);
                cases.push(Case::on_cuda(name, move |device| long(subject, seq_len, kind, device)));
            }
        }
        let name = format!("{}: more than 2^31 elements", subject.name);
        cases.push(Case::on_cuda(name, move |device| huge(subject, device)).alone());
    }
    cases
}

/// The rule for one long sequence, with the path for the CPU, which was judged by the formula at smaller sizes, as the plain
/// implementation and, in double precision, as the reference.
fn long(subject: &Subject, seq_len: i64, kind: Kind, device: Device) -> Result<String> {
    let inputs = (subject.inputs)(1, seq_len, 64);
    let values = |(seed, input): (usize, &Input)| noise(&input.shape, seed as i64) * input.scale + input.shift;
    let tensors: Vec<Tensor> = inputs.iter().enumerate().map(values).collect();
    let kinds: Vec<Kind> = inputs.iter().map(|input| if input.wide { Kind::Float } else { kind }).collect();
    let on_cpu = |x: &[Tensor]| -> Result<Vec<Tensor>> {
        let x: Vec<Tensor> = x.iter().map(|x| x.to_device(Device::Cpu)).collect();
        Ok((subject.op)(&x)?.iter().map(|y| y.to_device(device)).collect())
    };
    Rule { kernel: &subject.op, plain: &on_cpu, floor: 2. * Rule::floor_of(kind) }.check(&tensors, &kinds, device)
}

/// Offsets past 2^31: the last sequence of a large batch against the same sequence alone.
fn huge(subject: &Subject, device: Device) -> Result<Outcome> {
    const NEEDED_BYTES: u64 = 60 << 30;
    if let Some(not_run) = Outcome::without_room(device, NEEDED_BYTES)? {
        return Ok(not_run);
    }
    let (batch, seq_len, width) = (17, 65536, 2048);
    let make = |input: &Input| {
        let kind = if input.wide { Kind::Float } else { Kind::BFloat16 };
        let mut values = Tensor::empty(&input.shape, (kind, device)).uniform_(-1., 1.);
        let _ = values.g_mul_scalar_(input.scale).g_add_scalar_(input.shift);
        values.set_requires_grad(true)
    };
    tch::manual_seed(1);
    let inputs = (subject.inputs)(batch, seq_len, width);
    let whole: Vec<Tensor> = inputs.iter().map(make).collect();
    let last: Vec<Tensor> = inputs
        .iter()
        .zip(&whole)
        .map(|(input, x)| match input.batched {
            true => x.detach().narrow(0, batch - 1, 1).copy().set_requires_grad(true),
            false => x.detach().set_requires_grad(true),
        })
        .collect();
    let run = |inputs: &[Tensor]| -> Result<Tensor> {
        let y = (subject.op)(inputs)?.remove(0);
        // The gradient of the sum of squares depends on the output.
        (&y * y.detach()).sum(Kind::Float).f_backward()?;
        Ok(y.detach())
    };
    let (y, y_last) = (run(&whole)?, run(&last)?);
    if y.numel() <= 1 << 31 {
        return Err(Error::invalid("huge", format!("only {} elements", y.numel())));
    }
    let mut worst = max_rel(&y.narrow(0, batch - 1, 1), &y_last);
    for ((input, x), x_last) in inputs.iter().zip(&whole).zip(&last).filter(|((input, _), _)| input.batched) {
        let grad = x.grad().narrow(0, batch - 1, 1);
        let error = max_rel(&grad, &x_last.grad());
        let fits = error <= 2e-2;
        if !fits {
            let message =
                format!("the gradient of {:?} differs by {error:.3e} from that of its last sequence", input.shape);
            return Err(Error::invalid("huge", message));
        }
        worst = worst.max(error);
    }
    let fits = worst <= 2e-2;
    match fits {
        true => Ok(format!("{} elements, the last sequence within {worst:.1e}", y.numel()).into()),
        false => Err(Error::invalid("huge", format!("the last sequence differs by {worst:.3e}"))),
    }
}
