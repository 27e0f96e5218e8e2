//! The operations on CUDA, by kernels of our own: both branches in one launch.

// b batch, l seq_len, n and m tokens of one branch, d features

mod norm;
mod tokens;
mod twin;

use tch::{Kind, Tensor};

use flowhn_torch::kernel::Arg;
use flowhn_torch::{Error, Result};

use crate::Route;

pub(crate) use norm::{GatherNorm, MergeResidualNorm, SplitNorm};
pub(crate) use tokens::{concat_sums, merge, merge_residual, merge_sums, merge_sums_fp8, rounds_merge, scatter, split};
pub(crate) use twin::TwinNorm;

/// The routes that a launch works for: two of one sequence, or one.
#[derive(Clone, Copy)]
struct Routes<'a> {
    first: &'a Route,
    second: Option<&'a Route>,
}

impl<'a> Routes<'a> {
    fn iter(self) -> impl Iterator<Item = &'a Route> {
        [Some(self.first), self.second].into_iter().flatten()
    }

    /// Tokens of all routes in a batch of sequences, as a launch counts them.
    fn n_tokens(self, op: &'static str, batch: i64) -> Result<u32> {
        let n = batch * self.iter().map(|route| route.len() as i64).sum::<i64>();
        let too_many = |_| Error::invalid(op, format!("{n} tokens are more than a launch counts; split the batch"));
        i32::try_from(n).map(|n| n as u32).map_err(too_many)
    }

    /// The arguments `positions0, positions1, n0, n1`.
    fn args(self) -> [Arg<'a>; 4] {
        let len = |route: &Route| Arg::I32(route.len() as i32);
        [
            Arg::Tensor(self.first.positions_tensor()),
            Arg::opt(self.second.map(Route::positions_tensor)),
            len(self.first),
            self.second.map_or(Arg::I32(0), len),
        ]
    }
}

/// The two arguments that say how tokens of a tensor `[batch, tokens, d]` of elements of `n_bytes` lie, counted in words of
/// `word` bytes; zeros for a tensor that is not there.
fn strides<'a>(x: Option<&Tensor>, n_bytes: i64, word: i64) -> [Arg<'a>; 2] {
    let strides = x.map_or_else(|| vec![0, 0], Tensor::stride);
    [strides[0], strides[1]].map(|stride| Arg::I64(stride * n_bytes / word))
}

/// Weights as the kernels take them: f32, contiguous.
fn f32s(weights: &[&Tensor]) -> Result<Vec<Tensor>> {
    weights.iter().map(|weight| Ok(weight.f_to_kind(Kind::Float)?.f_contiguous()?)).collect()
}
