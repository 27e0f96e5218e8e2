//! The paths for the CPU: parallel over rayon, vectorised over channels, with backward passes written by hand.
//!
//! Work is cut into tasks by sizes alone, never by the number of threads, and every sum across tasks runs in a fixed order: the
//! same inputs give the same bits on any number of threads.

pub(crate) mod conv;
mod matrix;
mod recurrence;
pub(crate) mod scan;
mod scan_tile;
pub(crate) mod ssd;
mod ssd_chunk;
mod view;

use flowhn_nn::simd::Real;
use flowhn_torch::{ForwardCtx, Result};
use rayon::prelude::*;
use tch::{Device, Tensor};

use crate::args::{Carry, state_kind};

/// Fewer elementary steps than this are done faster by the calling thread alone than shared with others.
const PARALLEL_FROM: usize = 1 << 15;

/// Runs `run` on every task and returns the results in the tasks' order; in parallel if there are `work` elementary steps
/// enough to share.
fn map_tasks<T: Send, U: Send>(tasks: Vec<T>, work: usize, run: impl Fn(T) -> U + Sync + Send) -> Vec<U> {
    if work < PARALLEL_FROM || tasks.len() < 2 {
        tasks.into_iter().map(run).collect()
    } else {
        tasks.into_par_iter().with_max_len(1).map(run).collect()
    }
}

/// Sums equally long parts, in order.
fn sum_parts<R: Real>(parts: impl IntoIterator<Item = impl AsRef<[R]>>) -> Vec<R> {
    let mut parts = parts.into_iter();
    let mut sum = parts.next().map_or_else(Vec::new, |part| part.as_ref().to_vec());
    for part in parts {
        for (sum, &term) in sum.iter_mut().zip(part.as_ref()) {
            *sum += term;
        }
    }
    sum
}

/// The inputs of a custom function: those that are always there, then those that may be.
#[derive(Debug, Default)]
struct Inputs<'a> {
    tensors: Vec<&'a Tensor>,
}

impl<'a> Inputs<'a> {
    /// Appends a tensor if there is one and returns its index.
    fn push(&mut self, tensor: Option<&'a Tensor>) -> Option<usize> {
        self.tensors.push(tensor?);
        Some(self.tensors.len() - 1)
    }
}

/// What a forward turns into the final state: for a step the initial state itself, else a copy of it, or zeros where there is none.
fn state_to_advance(
    op: &'static str,
    carry: Carry,
    ctx: &ForwardCtx,
    inputs: &[&Tensor],
    initial_state: Option<usize>,
    size: &[i64],
) -> Result<Tensor> {
    carry.place(op, ctx, inputs, initial_state, || {
        let options = (state_kind(inputs[0].kind()), Device::Cpu);
        let Some(idx) = initial_state else { return Ok(Tensor::f_zeros(size, options)?) };
        let mut state = Tensor::f_empty(size, options)?;
        state.f_copy_(inputs[idx])?;
        Ok(state)
    })
}

/// The mask of resets as plain values, `[batch * seq_len]`.
fn reset_flags(reset_bl: Option<&Tensor>) -> Result<Option<Vec<bool>>> {
    match reset_bl {
        None => Ok(None),
        Some(reset_bl) => Ok(Some(flowhn_torch::cpu::slice::<bool>(&reset_bl.contiguous())?.to_vec())),
    }
}
