//! Splits and merges in CUDA graphs.

use flowhn_torch::Result;
use flowhn_torch::testing::{Case, check_replay};
use tch::{Device, Kind, Tensor};

use super::{EPS, both_read_all, doubled, routes, tokens, weight};
use crate::gather::{normed_gather, normed_split, normed_split_tokens};
use crate::merge::{concat_sums, normed_merge};
use crate::{Route, gather, merge, merge_residual, merge_sums, split};

/// Width of a token.
const D: i64 = 136;
/// Of tokens that go to attention and to the state-space branch in turn.
const RUNS: [usize; 4] = [5, 21, 5, 30];
/// Tokens where both branches read all.
const N_TOKENS: usize = 40;

/// An operation on tokens of the sequence, of attention and of the state-space branch, then two weights.
type Operation = fn(&[Tensor], &Route, &Route) -> Result<Vec<Tensor>>;

const OPERATIONS: [(&str, Operation); 7] = [
    ("split and merge", |x, attn, ssm| {
        let (first, second) = split(&x[0], attn, ssm)?;
        Ok(vec![first, second, gather(&x[0], ssm)?, merge(&x[1], &x[2], attn, ssm)?])
    }),
    ("merge_residual", |x, attn, ssm| Ok(vec![merge_residual(&x[0], &x[1], &x[2], attn, ssm)?])),
    ("merge_sums", |x, attn, ssm| Ok(vec![merge_sums(&doubled(&x[1]), &doubled(&x[2]), attn, ssm)?])),
    ("gather_norm", |x, attn, ssm| {
        Ok(vec![normed_gather(&x[0], attn, &x[3], EPS)?, normed_gather(&x[0], ssm, &x[4], EPS)?])
    }),
    ("split_norm", |x, attn, ssm| {
        let split = normed_split(&x[0], Some(&x[5]), attn, ssm, [&x[3], &x[4]], [EPS; 2])?;
        Ok(vec![split.sum_bld, split.attn_bnd, split.ssm_bmd])
    }),
    ("split_norm_tokens", |x, attn, ssm| {
        let split = normed_split_tokens(&x[0], Some(&x[5]), attn, ssm, [&x[3], &x[4]], [EPS; 2], [None, None])?;
        let normed = [split.attn_normed.values()?.shallow_clone(), split.ssm_normed.values()?.shallow_clone()];
        Ok([split.sum_bld, split.attn_bnd, split.ssm_bmd].into_iter().chain(normed).collect())
    }),
    ("merge_residual_norm", |x, attn, ssm| {
        let (sum, normed) = normed_merge(&x[0], &x[1], &x[2], attn, ssm, &x[3], EPS)?;
        Ok(vec![sum, normed])
    }),
];

/// What has kernels of its own where both branches read every token.
const OF_ALL_TOKENS: [(&str, Operation); 3] =
    [OPERATIONS[4], OPERATIONS[5], ("concat_sums", |x, _, _| Ok(vec![concat_sums(&doubled(&x[1]), &doubled(&x[2]))?]))];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [Kind::Float, Kind::BFloat16] {
        for (name, operation) in OPERATIONS {
            let name = format!("{name}: replayed from a CUDA graph, {kind:?}");
            let check = move |device| replays(operation, routes(&RUNS, device)?, kind, device);
            cases.push(Case::on_cuda(name, check));
        }
        for (name, operation) in OF_ALL_TOKENS {
            let name = format!("{name}: each token to both branches, replayed from a CUDA graph, {kind:?}");
            let check = move |device| replays(operation, both_read_all(N_TOKENS, device)?, kind, device);
            cases.push(Case::on_cuda(name, check));
        }
    }
    cases
}

fn replays(operation: Operation, (attn, ssm): (Route, Route), kind: Kind, device: Device) -> Result<String> {
    let part = |n: usize, seed| tokens(n, D, seed).narrow(2, 8, D);
    let n = attn.seq_len();
    let inputs = [part(n, 1), part(attn.len(), 2), part(ssm.len(), 3), weight(D, 4), weight(D, 5), part(n, 6)];
    let kinds = inputs.each_ref().map(|x| if x.dim() == 1 { Kind::Float } else { kind });
    check_replay(&|x| operation(x, &attn, &ssm), &inputs, &kinds, device)
}
