//! What recurrences have in common as custom functions: what is saved, the dtype of the arithmetic, tasks with a block of the output each.

use flowhn_nn::simd::Real;
use flowhn_torch::cpu::{self, ColumnBlock};
use flowhn_torch::{BackwardCtx, ForwardCtx, Function, Result, apply};
use tch::{Kind, Tensor};

use super::{map_tasks, state_to_advance};
use crate::args::Carry;

/// A recurrence that is scanned in chunks of tokens, each from the state before it.
pub(super) trait Recurrence: Send + 'static {
    /// The name in errors and on the autograd tape.
    const NAME: &'static str;

    /// The shape of the state.
    fn state_size(inputs: &[&Tensor]) -> Vec<i64>;

    /// Scans from the first token to the last and takes `state` along, from before the one to after the other. Chunk states are kept if
    /// `record` says so.
    fn run<R: Real>(&self, inputs: &[&Tensor], state: &mut [R], record: bool) -> Result<Scanned>;

    /// The gradients of the inputs from those of output and final state.
    fn run_backward<R: Real>(
        &self,
        inputs: &[&Tensor],
        chunk_states: &Tensor,
        grads: &[Tensor],
    ) -> Result<Vec<Option<Tensor>>>;
}

/// What a scan leaves beside the final state.
pub(super) struct Scanned {
    pub(super) y: Tensor,
    /// The state before each chunk, as the recurrence lays it out; without columns where nothing was recorded.
    pub(super) chunk_states: Tensor,
}

/// Applies the recurrence from the initial state, an input; returns the output and the final state.
pub(super) fn scan<T: Recurrence>(
    recurrence: T,
    inputs: &[&Tensor],
    initial_state: Option<usize>,
    carry: Carry,
) -> Result<(Tensor, Tensor)> {
    let mut outputs = apply(Recorded { recurrence, initial_state, carry }, inputs)?;
    let state = outputs.remove(1);
    Ok((outputs.remove(0), state))
}

/// The custom function.
struct Recorded<T> {
    recurrence: T,
    initial_state: Option<usize>,
    carry: Carry,
}

impl<T: Recurrence> Function for Recorded<T> {
    const NAME: &'static str = T::NAME;

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let Self { recurrence, initial_state, carry } = self;
        let record = ctx.is_recorded();
        let size = T::state_size(inputs);
        let mut state = state_to_advance(T::NAME, *carry, ctx, inputs, *initial_state, &size)?;
        let Scanned { y, chunk_states } = match inputs[0].kind() {
            Kind::Double => cpu::update(&mut state, |state: &mut [f64]| recurrence.run(inputs, state, record))?,
            _ => cpu::update(&mut state, |state: &mut [f32]| recurrence.run(inputs, state, record))?,
        };
        if record {
            inputs.iter().for_each(|input| ctx.save(input));
            ctx.save(&chunk_states);
        }
        Ok(vec![y.to_kind(inputs[0].kind()), state])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let saved: Vec<&Tensor> = ctx.saved().iter().collect();
        let (chunk_states, inputs) = saved.split_last().expect("the forward saved the states after the inputs");
        let mut gradients = match inputs[0].kind() {
            Kind::Double => self.recurrence.run_backward::<f64>(inputs, chunk_states, grads)?,
            _ => self.recurrence.run_backward::<f32>(inputs, chunk_states, grads)?,
        };
        for (gradient, input) in gradients.iter_mut().zip(inputs) {
            *gradient = gradient.as_ref().map(|gradient| gradient.to_kind(input.kind()));
        }
        Ok(gradients)
    }
}

/// An output and the chunk states of `n_tasks` tasks, `stored_len` values each, made by `run`, which gets a sequence's index, its block of
/// the output as `blocks` cuts it, its part of the chunk states and that of the state: `d_state` elements a channel, in the tasks' order.
pub(super) fn build<R: Real>(
    y_size: &[i64],
    [n_tasks, stored_len]: [usize; 2],
    (mut state, d_state): (&mut [R], usize),
    work: usize,
    blocks: impl Fn(&mut [R]) -> Vec<(usize, ColumnBlock<'_, R>)>,
    run: impl Fn(usize, ColumnBlock<'_, R>, &mut [R], &mut [R]) + Sync + Send,
) -> Result<Scanned> {
    let (y, (chunk_states, ())) = cpu::try_build(y_size, |y: &mut [R]| {
        cpu::try_build(&[n_tasks as i64, stored_len as i64], |mut stored: &mut [R]| {
            let mut tasks = Vec::with_capacity(n_tasks);
            for (batch_idx, y) in blocks(y) {
                let (own, rest) = stored.split_at_mut(stored_len);
                stored = rest;
                let (own_state, rest) = state.split_at_mut(y.n_cols() * d_state);
                state = rest;
                tasks.push((batch_idx, y, own, own_state));
            }
            map_tasks(tasks, work, |(batch_idx, y, stored, state)| run(batch_idx, y, stored, state));
            Ok(())
        })
    })?;
    Ok(Scanned { y, chunk_states })
}
