//! Checks of gather and merge, alone and fused with norms, that run on any device.

// b batch, l seq_len, n and m tokens of one branch, d features

mod extremes;
mod fp8;
mod replay;

use flowhn_torch::testing::{Case, Rule, noise, same_bits};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::gather::{normed_gather, normed_split, normed_split_tokens};
use crate::merge::{concat_sums, normed_merge};
use crate::{Route, gather, merge, merge_residual, merge_sums, split};
use flowhn_nn::Residual;

const BATCH: i64 = 3;
const EPS: f64 = 1e-6;
/// Widths that vectors fit and one that they do not.
const WIDTHS: [i64; 4] = [7, 128, 768, 2048];
/// One that takes the form for the widest rows.
const WIDEST: [i64; 1] = [9000];
/// Those of the patterns with many tokens.
const LONG_WIDTHS: [i64; 2] = [64, 136];

/// A check of the routes that runs of tokens mean, with the width and the dtype of the tokens.
type OfRuns = fn(&[usize], i64, Kind, Device) -> Result<String>;

/// Those of operations that compute.
const OPERATIONS: [(&str, OfRuns); 5] = [
    ("merge_residual", residual),
    ("gather_norm", gather_norms),
    ("split_norm", split_norms),
    ("split_norm_tokens", split_norm_tokens),
    ("merge_residual_norm", merge_norms),
];

/// Every check of this crate.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let wide_patterns = vec![("a window that wraps", vec![5, 21, 5])];
    let sizes = [(&WIDTHS[..], patterns()), (&LONG_WIDTHS[..], long_patterns()), (&WIDEST[..], wide_patterns)];
    for (widths, patterns) in sizes {
        for (name, runs) in patterns {
            for kind in [Kind::Float, Kind::BFloat16] {
                for &d in widths {
                    for (op, check) in OPERATIONS {
                        let runs = runs.clone();
                        let name = format!("{op}: {name}, {d}, {kind:?}");
                        cases.push(Case::new(name, move |device| check(&runs, d, kind, device)));
                    }
                }
            }
        }
    }
    for (op, check) in OPERATIONS {
        let name = format!("{op}: 65,536 tokens, token by token, 64, BFloat16");
        cases.push(Case::on_cuda(name, move |device| check(&[1; 65_536], 64, Kind::BFloat16, device)));
    }
    for (name, runs) in patterns() {
        cases.push(Case::new(format!("split and merge: {name}, every dtype"), move |device| copies(&runs, device)));
    }
    for (n_tokens, d) in [(0, 128), (1, 7), (31, 128), (9, 768), (300, 2048), (3, 4096), (5, 4104), (4096, 136)] {
        for kind in [Kind::Float, Kind::BFloat16] {
            let case = |op: &str, check: fn(&(Route, Route), i64, Kind, Device) -> Result<String>| {
                let name = format!("{op}: {n_tokens} tokens, each to both branches, {d}, {kind:?}");
                Case::new(name, move |device| check(&both_read_all(n_tokens, device)?, d, kind, device))
            };
            cases.push(case("split_norm", split_norms_of));
            cases.push(case("split_norm_tokens", split_norm_tokens_of));
            cases.push(case("split_norm where one branch learns", split_norms_of_one));
            cases.push(case("concat_sums", concats));
        }
    }
    cases.extend(extremes::cases());
    cases.extend(fp8::cases());
    cases.extend(replay::cases());
    cases
}

/// Sequences as runs of tokens that go to attention and to the state-space branch in turn.
fn patterns() -> Vec<(&'static str, Vec<usize>)> {
    vec![
        ("one token", vec![1]),
        ("halves", vec![17, 14]),
        ("halves, the state-space branch first", vec![0, 14, 17]),
        ("a window", vec![0, 9, 13, 9]),
        ("a window that wraps", vec![5, 21, 5]),
        ("token by token", vec![1; 66]),
        ("all to attention", vec![12]),
        ("none to attention", vec![0, 12]),
    ]
}

/// So many tokens that each team of threads has many rows.
fn long_patterns() -> Vec<(&'static str, Vec<usize>)> {
    vec![("halves of 4096 tokens", vec![2048; 2]), ("4096 tokens, token by token", vec![1; 4096])]
}

/// The two routes of the runs, and the positions that they mean.
fn routes(runs: &[usize], device: Device) -> Result<(Route, Route)> {
    let (mut spans, mut start) = ([Vec::new(), Vec::new()], 0);
    for (i, len) in runs.iter().enumerate() {
        spans[i % 2].push(start..start + len);
        start += len;
    }
    let [attn, ssm] = spans;
    Ok((Route::new(start, &attn, device)?, Route::new(start, &ssm, device)?))
}

/// Routes that both take every token.
fn both_read_all(n_tokens: usize, device: Device) -> Result<(Route, Route)> {
    let all = || Route::all(n_tokens, device);
    Ok((all()?, all()?))
}

/// Inputs of `[batch, tokens, d]` as parts of wider tensors, so that tokens are not neighbours in memory.
fn tokens(n: usize, d: i64, seed: i64) -> Tensor {
    noise(&[BATCH, n as i64, d + 8], seed) * 2.
}

fn part(x: &Tensor, d: i64) -> Tensor {
    x.narrow(2, 8, d)
}

fn weight(d: i64, seed: i64) -> Tensor {
    noise(&[d], seed) * 0.5 + 1.
}

/// The formulas, in operators of libtorch.
fn taken(x_bld: &Tensor, route: &Route) -> Tensor {
    x_bld.index_select(1, route.positions_tensor())
}

fn put(a_bnd: &Tensor, s_bmd: &Tensor, attn: &Route, ssm: &Route) -> Tensor {
    let order = Tensor::cat(&[attn.positions_tensor(), ssm.positions_tensor()], 0).argsort(0, false);
    Tensor::cat(&[a_bnd, s_bmd], 1).index_select(1, &order)
}

fn normed(x: &Tensor, weight: &Tensor) -> Tensor {
    flowhn_nn::reference::rms_norm(x, weight, EPS)
}

fn check(
    kernel: &dyn Fn(&[Tensor]) -> Result<Vec<Tensor>>,
    plain: &dyn Fn(&[Tensor]) -> Result<Vec<Tensor>>,
    inputs: &[Tensor],
    kind: Kind,
    device: Device,
) -> Result<String> {
    let kinds: Vec<Kind> = inputs.iter().map(|x| if x.dim() == 1 { Kind::Float } else { kind }).collect();
    Rule { kernel, plain, floor: Rule::floor_of(kind) }.check(inputs, &kinds, device)
}

fn residual(runs: &[usize], d: i64, kind: Kind, device: Device) -> Result<String> {
    let (attn, ssm) = routes(runs, device)?;
    let kernel = |x: &[Tensor]| {
        let [x, a, s] = [part(&x[0], d), part(&x[1], d), part(&x[2], d)];
        let (first, second) = split(&x, &attn, &ssm)?;
        let sums = merge_sums(&Residual { x: a.shallow_clone(), change: Some(&a * 3.) }, &doubled(&s), &attn, &ssm)?;
        Ok(vec![merge_residual(&x, &a, &s, &attn, &ssm)?, merge(&a, &s, &attn, &ssm)?, sums, first, second])
    };
    let plain = |x: &[Tensor]| {
        let [x, a, s] = [part(&x[0], d), part(&x[1], d), part(&x[2], d)];
        let merged = put(&a, &s, &attn, &ssm);
        let sums = put(&(&a + &a * 3.), &(&s + &s), &attn, &ssm);
        Ok(vec![&x + &merged, merged, sums, taken(&x, &attn), taken(&x, &ssm)])
    };
    let inputs = [tokens(attn.seq_len(), d, 1), tokens(attn.len(), d, 2), tokens(ssm.len(), d, 3)];
    check(&kernel, &plain, &inputs, kind, device)
}

/// A branch whose last sublayer adds what it was given.
fn doubled(x: &Tensor) -> Residual {
    Residual { x: x.shallow_clone(), change: Some(x.shallow_clone()) }
}

fn gather_norms(runs: &[usize], d: i64, kind: Kind, device: Device) -> Result<String> {
    let (attn, ssm) = routes(runs, device)?;
    let kernel = |x: &[Tensor]| {
        let view = part(&x[0], d);
        Ok(vec![normed_gather(&view, &attn, &x[1], EPS)?, normed_gather(&view, &ssm, &x[2], EPS)?])
    };
    let plain = |x: &[Tensor]| {
        let view = part(&x[0], d);
        Ok(vec![normed(&taken(&view, &attn), &x[1]), normed(&taken(&view, &ssm), &x[2])])
    };
    let inputs = [tokens(attn.seq_len(), d, 1), weight(d, 2), weight(d, 3)];
    check(&kernel, &plain, &inputs, kind, device)
}

/// With an addend, and without one in a second step on the sum that the first handed on.
fn split_norms(runs: &[usize], d: i64, kind: Kind, device: Device) -> Result<String> {
    split_norms_of(&routes(runs, device)?, d, kind, device)
}

fn split_norms_of((attn, ssm): &(Route, Route), d: i64, kind: Kind, device: Device) -> Result<String> {
    let kernel = |x: &[Tensor]| {
        let (view, delta, weights) = (part(&x[0], d), part(&x[1], d), [&x[2], &x[3]]);
        let first = normed_split(&view, Some(&delta), attn, ssm, weights, [EPS; 2])?;
        let second = normed_split(&first.sum_bld, None, attn, ssm, weights, [EPS; 2])?;
        Ok(vec![second.sum_bld, first.attn_bnd, first.ssm_bmd, second.attn_bnd, second.ssm_bmd])
    };
    let plain = |x: &[Tensor]| {
        let sum = part(&x[0], d) + part(&x[1], d);
        let branches = || [normed(&taken(&sum, attn), &x[2]), normed(&taken(&sum, ssm), &x[3])];
        let ([a, s], [again_a, again_s]) = (branches(), branches());
        Ok(vec![sum, a, s, again_a, again_s])
    };
    let n = attn.seq_len();
    check(&kernel, &plain, &[tokens(n, d, 1), tokens(n, d, 2), weight(d, 3), weight(d, 4)], kind, device)
}

/// One branch has a fixed weight, and nobody reads what it gets; then the other.
fn split_norms_of_one((attn, ssm): &(Route, Route), d: i64, kind: Kind, device: Device) -> Result<String> {
    let fixed = weight(d, 4).to_kind(Kind::Float).to_device(device);
    let kernel = |x: &[Tensor]| {
        let (view, delta) = (part(&x[0], d), part(&x[1], d));
        let split = |weights| normed_split(&view, Some(&delta), attn, ssm, weights, [EPS; 2]);
        let (first, second) = (split([&x[2], &fixed])?, split([&fixed, &x[3]])?);
        Ok(vec![first.sum_bld, first.attn_bnd, second.ssm_bmd])
    };
    let plain = |x: &[Tensor]| {
        let sum = part(&x[0], d) + part(&x[1], d);
        let branches = [normed(&taken(&sum, attn), &x[2]), normed(&taken(&sum, ssm), &x[3])];
        Ok([sum].into_iter().chain(branches).collect())
    };
    let n = attn.seq_len();
    check(&kernel, &plain, &[tokens(n, d, 1), tokens(n, d, 2), weight(d, 3), weight(d, 5)], kind, device)
}

/// With an addend, and without one in a second step; gradients arrive at the sum, at its tokens and at their norms, transposed at some.
fn split_norm_tokens(runs: &[usize], d: i64, kind: Kind, device: Device) -> Result<String> {
    split_norm_tokens_of(&routes(runs, device)?, d, kind, device)
}

fn split_norm_tokens_of((attn, ssm): &(Route, Route), d: i64, kind: Kind, device: Device) -> Result<String> {
    let kernel = |x: &[Tensor]| {
        let (view, delta, weights) = (part(&x[0], d), part(&x[1], d), [&x[2], &x[3]]);
        let mut outputs = Vec::new();
        let split = |x: &Tensor, delta: Option<&Tensor>| {
            normed_split_tokens(x, delta, attn, ssm, weights, [EPS; 2], [None, None])
        };
        let first = split(&view, Some(&delta))?;
        let second = split(&first.sum_bld, None)?;
        for split in [&first, &second] {
            outputs.extend([split.attn_normed.values()?.shallow_clone(), split.ssm_normed.values()?.shallow_clone()]);
            outputs.extend([split.attn_bnd.transpose(0, 1), &split.ssm_bmd * 2.]);
        }
        outputs.push(second.sum_bld);
        Ok(outputs)
    };
    let plain = |x: &[Tensor]| {
        let sum = part(&x[0], d) + part(&x[1], d);
        let mut outputs = Vec::new();
        for _ in 0..2 {
            let (a, s) = (taken(&sum, attn), taken(&sum, ssm));
            outputs.extend([normed(&a, &x[2]), normed(&s, &x[3]), a.transpose(0, 1), s * 2.]);
        }
        outputs.push(sum);
        Ok(outputs)
    };
    let n = attn.seq_len();
    check(&kernel, &plain, &[tokens(n, d, 1), tokens(n, d, 2), weight(d, 3), weight(d, 4)], kind, device)
}

/// Of terms with gaps between tokens; the gradient arrives transposed.
fn concats((attn, _): &(Route, Route), d: i64, kind: Kind, device: Device) -> Result<String> {
    let kernel = |x: &[Tensor]| {
        let [a, s] = [part(&x[0], d), part(&x[1], d)];
        let first = Residual { change: Some(&a * 3.), x: a };
        Ok(vec![concat_sums(&first, &doubled(&s))?.transpose(0, 1)])
    };
    let plain = |x: &[Tensor]| {
        let [a, s] = [part(&x[0], d), part(&x[1], d)];
        Ok(vec![Tensor::cat(&[&a + &a * 3., &s + &s], -1).transpose(0, 1)])
    };
    let n = attn.seq_len();
    check(&kernel, &plain, &[tokens(n, d, 1), tokens(n, d, 2)], kind, device)
}

fn merge_norms(runs: &[usize], d: i64, kind: Kind, device: Device) -> Result<String> {
    let (attn, ssm) = routes(runs, device)?;
    let kernel = |x: &[Tensor]| {
        let [view, a, s] = [part(&x[0], d), part(&x[1], d), part(&x[2], d)];
        let (sum, normed) = normed_merge(&view, &a, &s, &attn, &ssm, &x[3], EPS)?;
        // Transposed, the gradients that arrive are strided.
        Ok(vec![sum.transpose(0, 1), normed.transpose(0, 1)])
    };
    let plain = |x: &[Tensor]| {
        let sum = part(&x[0], d) + put(&part(&x[1], d), &part(&x[2], d), &attn, &ssm);
        let normed = normed(&sum, &x[3]);
        Ok(vec![sum.transpose(0, 1), normed.transpose(0, 1)])
    };
    let inputs = [tokens(attn.seq_len(), d, 1), tokens(attn.len(), d, 2), tokens(ssm.len(), d, 3), weight(d, 4)];
    check(&kernel, &plain, &inputs, kind, device)
}

/// Tokens of every dtype keep their bits.
fn copies(runs: &[usize], device: Device) -> Result<String> {
    let (attn, ssm) = routes(runs, device)?;
    for kind in [Kind::Bool, Kind::Uint8, Kind::Int64, Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double] {
        for d in [1, 3, 24] {
            let x = (noise(&[BATCH, attn.seq_len() as i64, d], 1) * 100.).to_kind(kind).to_device(device);
            let (a, s) = split(&x, &attn, &ssm)?;
            let same = same_bits(&a, &taken(&x, &attn))
                && same_bits(&s, &taken(&x, &ssm))
                && same_bits(&gather(&x, &ssm)?, &taken(&x, &ssm))
                && same_bits(&merge(&a, &s, &attn, &ssm)?, &x);
            if !same {
                return Err(Error::invalid("copies", format!("{kind:?} x {d}: the tokens changed")));
            }
        }
    }
    Ok(String::new())
}
