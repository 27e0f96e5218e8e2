//! SSD on the CPU: pairs of heads in parallel, chunks of tokens in turn.
// b batch, l seq_len, h n_heads, p d_head, g n_groups, n d_state

use flowhn_nn::simd::{Real, dispatch};
use flowhn_torch::Result;
use flowhn_torch::cpu::{self, ColumnBlock};
use tch::Tensor;

use super::matrix::Matrix;
use super::recurrence::{self, Recurrence, Scanned};
use super::ssd_chunk::{GroupChunk, GroupGrads, HeadChunk, HeadGrads};
use super::view::{Rows, Source};
use super::{Inputs, map_tasks, reset_flags, sum_parts};
use crate::args::Carry;
use crate::scan::DtActivation;
use crate::ssd::{Ssd, SsdOutput};

/// Longest chunk used here, whatever the caller asks for: past it the products inside a chunk, which grow with its length, cost
/// more than the states they save.
const MAX_CHUNK: usize = 64;

/// Runs SSD on checked arguments with at least one element.
pub(crate) fn ssd(args: &Ssd, carry: Carry) -> Result<SsdOutput> {
    let mut inputs = Inputs { tensors: vec![args.x_blhp, args.dt_blh, args.a_h, args.b_blgn, args.c_blgn] };
    let function = SsdFunction {
        d: inputs.push(args.d_h),
        dt_bias: inputs.push(args.dt_bias_h),
        initial_state: inputs.push(args.initial_state_bhpn),
        dt_activation: args.dt_activation,
        reset: reset_flags(args.reset_bl)?,
        chunk_len: args.chunk_len.min(MAX_CHUNK),
    };
    let initial_state = function.initial_state;
    let (y_blhp, final_state_bhpn) = recurrence::scan(function, &inputs.tensors, initial_state, carry)?;
    Ok(SsdOutput { y_blhp, final_state_bhpn })
}

/// The custom function; optional inputs by their index.
struct SsdFunction {
    d: Option<usize>,
    dt_bias: Option<usize>,
    initial_state: Option<usize>,
    dt_activation: DtActivation,
    reset: Option<Vec<bool>>,
    chunk_len: usize,
}

impl Recurrence for SsdFunction {
    const NAME: &'static str = "ssd";

    /// `[batch, n_heads, d_head, d_state]`.
    fn state_size(inputs: &[&Tensor]) -> Vec<i64> {
        let (x, b) = (inputs[0].size(), inputs[3].size());
        vec![x[0], x[2], x[3], b[3]]
    }

    /// Chunk states are `[tasks, chunks * task_heads * d_state * d_head]`.
    fn run<R: Real>(&self, inputs: &[&Tensor], state: &mut [R], record: bool) -> Result<Scanned> {
        let sources = Sources::new::<R>(self, inputs);
        let operands = sources.operands::<R>(self)?;
        let shape = operands.shape;
        let n_tasks = shape.batch * shape.tasks_per_sequence();
        let stored_len = if record { shape.n_chunks() * shape.task_heads() * shape.state_len() } else { 0 };
        recurrence::build(
            &inputs[0].size(),
            [n_tasks, stored_len],
            (state, shape.d_state),
            shape.work(),
            |y| shape.head_blocks(y),
            |batch_idx, y, stored, state| {
                dispatch(
                    #[inline(always)]
                    || operands.forward_heads(batch_idx, y, stored, state),
                )
            },
        )
    }

    fn run_backward<R: Real>(
        &self,
        inputs: &[&Tensor],
        chunk_states: &Tensor,
        grads: &[Tensor],
    ) -> Result<Vec<Option<Tensor>>> {
        let sources = Sources::new::<R>(self, inputs);
        let operands = sources.operands::<R>(self)?;
        let shape = operands.shape;
        let (grad_y, grad_state) = (Source::new::<R>(&grads[0]), grads[1].contiguous());
        let recorded = Recorded {
            chunk_states: cpu::slice::<R>(chunk_states)?,
            grad_y: (0..shape.n_heads).map(|h| grad_y.rows_of_part(h)).collect::<Result<_>>()?,
            grad_state: cpu::slice::<R>(&grad_state)?,
        };
        let (x, tasks) = cpu::try_build(&inputs[0].size(), |x: &mut [R]| {
            Ok(map_tasks(shape.head_blocks(x), shape.work(), |(batch_idx, x)| {
                dispatch(
                    #[inline(always)]
                    || operands.backward_heads(batch_idx, x, &recorded),
                )
            }))
        })?;

        let sequences = || tasks.chunks(shape.tasks_per_sequence());
        let per_head = |part: fn(&TaskGrads<R>) -> &Vec<R>| {
            let of_sequence = |tasks: &[TaskGrads<R>]| tasks.iter().flat_map(|t| part(t).iter().copied()).collect();
            cpu::from_slice(&[shape.n_heads as i64], &sum_parts(sequences().map(of_sequence).collect::<Vec<Vec<R>>>()))
        };
        // [batch, group, seq_len, d_state] from the tasks of each group.
        let tasks_per_group = shape.tasks_per_sequence() / shape.n_groups;
        let per_group = |part: fn(&TaskGrads<R>) -> &Vec<R>| -> Result<Tensor> {
            let groups = tasks.chunks(tasks_per_group).flat_map(|tasks| sum_parts(tasks.iter().map(part)));
            let sizes = [shape.batch, shape.n_groups, shape.seq_len, shape.d_state].map(|size| size as i64);
            Ok(cpu::from_slice(&sizes, &groups.collect::<Vec<R>>())?.transpose(1, 2))
        };
        let dt = cpu::build(&inputs[1].size(), |out: &mut [R]| {
            let n_heads = shape.task_heads();
            for (sequence, out) in sequences().zip(out.chunks_mut(shape.seq_len * shape.n_heads)) {
                for (i, out) in out.iter_mut().enumerate() {
                    let (token_idx, head_idx) = (i / shape.n_heads, i % shape.n_heads);
                    *out = sequence[head_idx / n_heads].dt[(head_idx % n_heads) * shape.seq_len + token_idx];
                }
            }
        });
        let mut out: Vec<Option<Tensor>> = (0..inputs.len()).map(|_| None).collect();
        let mut put = |idx: Option<usize>, grad: Tensor| {
            if let Some(idx) = idx {
                out[idx] = Some(grad);
            }
        };
        put(Some(0), x);
        put(Some(1), dt);
        put(Some(2), per_head(|t| &t.a)?);
        put(Some(3), per_group(|t| &t.b)?);
        put(Some(4), per_group(|t| &t.c)?);
        put(self.d, per_head(|t| &t.d)?);
        put(self.dt_bias, per_head(|t| &t.dt_bias)?);
        if self.initial_state.is_some() {
            let initial: Vec<R> = tasks.iter().flat_map(|t| t.initial.iter().copied()).collect();
            put(self.initial_state, cpu::from_slice(&shape.state(), &initial)?);
        }
        Ok(out)
    }
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: usize,
    seq_len: usize,
    n_heads: usize,
    d_head: usize,
    n_groups: usize,
    d_state: usize,
    chunk_len: usize,
}

impl Shape {
    fn state(self) -> [i64; 4] {
        [self.batch, self.n_heads, self.d_head, self.d_state].map(|size| size as i64)
    }

    fn state_len(self) -> usize {
        self.d_head * self.d_state
    }

    fn n_chunks(self) -> usize {
        self.seq_len.div_ceil(self.chunk_len)
    }

    /// Heads of one task, of the same group: they share the scores `c_i . b_j`.
    fn task_heads(self) -> usize {
        if (self.n_heads / self.n_groups).is_multiple_of(2) { 2 } else { 1 }
    }

    fn tasks_per_sequence(self) -> usize {
        self.n_heads / self.task_heads()
    }

    /// Updates of a state element.
    fn work(self) -> usize {
        self.batch * self.seq_len * self.n_heads * self.state_len()
    }

    /// Cuts `[batch, seq_len, n_heads, d_head]` into the columns of each task, named by the sequence.
    fn head_blocks<R>(self, rows: &mut [R]) -> Vec<(usize, ColumnBlock<'_, R>)> {
        let width = self.n_heads * self.d_head;
        let sequences = rows.chunks_mut(self.seq_len * width).enumerate();
        sequences
            .flat_map(|(batch_idx, rows)| {
                let blocks = cpu::column_blocks(rows, width, self.task_heads() * self.d_head);
                blocks.into_iter().map(move |block| (batch_idx, block))
            })
            .collect()
    }
}

/// The inputs in the dtype of the computation.
struct Sources {
    x: Source,
    dt: Source,
    b: Source,
    c: Source,
    a: Tensor,
    d: Option<Tensor>,
    dt_bias: Option<Tensor>,
}

impl Sources {
    fn new<R: Real>(ssd: &SsdFunction, inputs: &[&Tensor]) -> Self {
        let contiguous = |idx: Option<usize>| idx.map(|idx| inputs[idx].contiguous());
        Self {
            x: Source::new::<R>(inputs[0]),
            dt: Source::new::<R>(inputs[1]),
            b: Source::new::<R>(inputs[3]),
            c: Source::new::<R>(inputs[4]),
            a: inputs[2].contiguous(),
            d: contiguous(ssd.d),
            dt_bias: contiguous(ssd.dt_bias),
        }
    }

    fn operands<'a, R: Real>(&'a self, ssd: &'a SsdFunction) -> Result<Operands<'a, R>> {
        let [batch, seq_len, n_heads, d_head] = self.x.sizes();
        let [_, _, n_groups, d_state] = self.b.sizes();
        let slice = |tensor: &'a Option<Tensor>| tensor.as_ref().map(cpu::slice::<R>).transpose();
        let parts = |source: &'a Source, n: usize| (0..n).map(|i| source.rows_of_part(i)).collect::<Result<Vec<_>>>();
        let chunk_len = ssd.chunk_len.min(seq_len);
        Ok(Operands {
            shape: Shape { batch, seq_len, n_heads, d_head, n_groups, d_state, chunk_len },
            x: parts(&self.x, n_heads)?,
            dt: self.dt.rows()?,
            b: parts(&self.b, n_groups)?,
            c: parts(&self.c, n_groups)?,
            a: cpu::slice(&self.a)?,
            d: slice(&self.d)?,
            dt_bias: slice(&self.dt_bias)?,
            reset: ssd.reset.as_deref(),
            dt_activation: ssd.dt_activation,
        })
    }
}

/// The inputs as elements: `x` by head, `b` and `c` by group.
struct Operands<'a, R> {
    shape: Shape,
    x: Vec<Rows<'a, R>>,
    dt: Rows<'a, R>,
    b: Vec<Rows<'a, R>>,
    c: Vec<Rows<'a, R>>,
    a: &'a [R],
    d: Option<&'a [R]>,
    dt_bias: Option<&'a [R]>,
    reset: Option<&'a [bool]>,
    dt_activation: DtActivation,
}

/// What the backward reads beside the inputs; the gradient of `y` by head.
struct Recorded<'a, R> {
    chunk_states: &'a [R],
    grad_y: Vec<Rows<'a, R>>,
    grad_state: &'a [R],
}

/// What one backward task returns for its heads.
struct TaskGrads<R> {
    a: Vec<R>,
    d: Vec<R>,
    dt_bias: Vec<R>,
    /// `[heads, d_head, d_state]`.
    initial: Vec<R>,
    /// `[heads, seq_len]`.
    dt: Vec<R>,
    /// `[seq_len, d_state]`, these heads' part.
    b: Vec<R>,
    c: Vec<R>,
}

impl<R: Real> Operands<'_, R> {
    /// Writes the outputs of the heads of `y` and advances their states `[heads, d_head, d_state]`.
    #[inline(always)]
    fn forward_heads(&self, batch_idx: usize, mut y: ColumnBlock<R>, stored: &mut [R], states_hpn: &mut [R]) {
        let Shape { seq_len, d_head, d_state, chunk_len, .. } = self.shape;
        let heads = y.start() / d_head..(y.start() + y.n_cols()) / d_head;
        let mut group = GroupChunk::new(chunk_len, d_state);
        let mut head = HeadChunk::new(chunk_len, d_head);
        let mut states: Vec<_> =
            states_hpn.chunks_exact(self.shape.state_len()).map(|state_pn| state_first(state_pn, d_state)).collect();
        let mut stored = stored.chunks_exact_mut(self.shape.state_len());
        for first in (0..seq_len).step_by(chunk_len) {
            self.load_group(&mut group, batch_idx, first, heads.start);
            for (slot, (head_idx, state)) in heads.clone().zip(&mut states).enumerate() {
                if let Some(stored) = stored.next() {
                    stored.copy_from_slice(state.as_slice());
                }
                self.load_head(&mut head, &group, batch_idx, first, head_idx);
                let d = self.d.map_or(R::ZERO, |d| d[head_idx]);
                for i in 0..group.len {
                    let y = &mut y.row(first + i)[slot * d_head..][..d_head];
                    head.output(&group, state, d, i, y);
                }
                head.advance(&group, state);
            }
        }
        for (out, value) in states_hpn.iter_mut().zip(states.iter().flat_map(|state| head_first(state, d_head))) {
            *out = value;
        }
    }

    /// Gradients of the heads of `x`, walking the chunks from the last to the first.
    #[inline(always)]
    fn backward_heads(&self, batch_idx: usize, mut x: ColumnBlock<R>, recorded: &Recorded<R>) -> TaskGrads<R> {
        let Shape { seq_len, n_heads, d_head, d_state, chunk_len, .. } = self.shape;
        let heads = x.start() / d_head..(x.start() + x.n_cols()) / d_head;
        let task_idx = batch_idx * self.shape.tasks_per_sequence() + heads.start / heads.len();
        let mut group = GroupChunk::new(chunk_len, d_state);
        let mut head = HeadChunk::new(chunk_len, d_head);
        let mut state = Matrix::zeros(d_state, d_head);
        let mut shared = GroupGrads::new(chunk_len, d_state);
        let mut grads: Vec<_> = heads
            .clone()
            .map(|head_idx| {
                let mut grads = HeadGrads::new(chunk_len, d_head, d_state);
                let start = (batch_idx * n_heads + head_idx) * self.shape.state_len();
                grads.state_np = state_first(&recorded.grad_state[start..][..self.shape.state_len()], d_state);
                grads
            })
            .collect();
        let mut dt = vec![R::ZERO; heads.len() * seq_len];
        let (mut b, mut c) = (vec![R::ZERO; seq_len * d_state], vec![R::ZERO; seq_len * d_state]);

        for chunk_idx in (0..self.shape.n_chunks()).rev() {
            let first = chunk_idx * chunk_len;
            self.load_group(&mut group, batch_idx, first, heads.start);
            shared.clear();
            for (slot, (head_idx, grads)) in heads.clone().zip(&mut grads).enumerate() {
                let stored_idx = (task_idx * self.shape.n_chunks() + chunk_idx) * heads.len() + slot;
                let stored = &recorded.chunk_states[stored_idx * self.shape.state_len()..];
                state.as_mut_slice().copy_from_slice(&stored[..self.shape.state_len()]);
                self.load_head(&mut head, &group, batch_idx, first, head_idx);
                recorded.grad_y[head_idx].load(batch_idx, first, group.len, 0, d_head, grads.y_qp.as_mut_slice());
                let d = self.d.map_or(R::ZERO, |d| d[head_idx]);
                grads.backward(&head, &group, &state, (self.a[head_idx], d), &mut shared);
                for i in 0..group.len {
                    x.row(first + i)[slot * d_head..][..d_head].copy_from_slice(grads.x_qp.row(i));
                }
                dt[slot * seq_len + first..][..group.len].copy_from_slice(&grads.dt_q[..group.len]);
            }
            shared.finish(&group);
            let states = first * d_state..(first + group.len) * d_state;
            b[states.clone()].copy_from_slice(&shared.b_qn.as_slice()[..group.len * d_state]);
            c[states].copy_from_slice(&shared.c_qn.as_slice()[..group.len * d_state]);
        }
        TaskGrads {
            a: grads.iter().map(|grads| grads.a).collect(),
            d: grads.iter().map(|grads| grads.d).collect(),
            dt_bias: grads.iter().map(|grads| grads.dt_bias).collect(),
            initial: grads.iter().flat_map(|grads| head_first(&grads.state_np, d_head)).collect(),
            dt,
            b,
            c,
        }
    }

    #[inline(always)]
    fn load_group(&self, group: &mut GroupChunk<R>, batch_idx: usize, first: usize, head_idx: usize) {
        let Shape { seq_len, n_heads, n_groups, d_state, chunk_len, .. } = self.shape;
        let group_idx = head_idx / (n_heads / n_groups);
        let len = chunk_len.min(seq_len - first);
        group.len = len;
        self.b[group_idx].load(batch_idx, first, len, 0, d_state, group.b_qn.as_mut_slice());
        self.c[group_idx].load(batch_idx, first, len, 0, d_state, group.c_qn.as_mut_slice());
        if let Some(reset) = self.reset {
            group.reset_q[..len].copy_from_slice(&reset[batch_idx * seq_len + first..][..len]);
        }
        group.score();
    }

    #[inline(always)]
    fn load_head(
        &self,
        head: &mut HeadChunk<R>,
        group: &GroupChunk<R>,
        batch_idx: usize,
        first: usize,
        head_idx: usize,
    ) {
        let (d_head, len) = (self.shape.d_head, group.len);
        self.x[head_idx].load(batch_idx, first, len, 0, d_head, head.x_qp.as_mut_slice());
        let bias = self.dt_bias.map_or(R::ZERO, |bias| bias[head_idx]);
        for (i, (dt, slope)) in head.dt_q[..len].iter_mut().zip(&mut head.dt_slope_q).enumerate() {
            let raw = self.dt.row(batch_idx, first + i)[head_idx] + bias;
            (*dt, *slope) = match self.dt_activation {
                DtActivation::Identity => (raw, R::ONE),
                DtActivation::Softplus => (raw.softplus(), raw.sigmoid()),
            };
        }
        head.mix(group, self.a[head_idx]);
    }
}

/// `[d_head, d_state]` as `[d_state, d_head]`.
#[inline(always)]
fn state_first<R: Real>(state_pn: &[R], d_state: usize) -> Matrix<R> {
    let mut state = Matrix::zeros(d_state, state_pn.len() / d_state);
    for n in 0..d_state {
        for (out, row) in state.row_mut(n).iter_mut().zip(state_pn.chunks_exact(d_state)) {
            *out = row[n];
        }
    }
    state
}

/// `[d_state, d_head]` as `[d_head, d_state]`.
#[inline(always)]
fn head_first<R: Real>(state: &Matrix<R>, d_head: usize) -> impl Iterator<Item = R> {
    let rows = state.as_slice().chunks_exact(d_head);
    (0..d_head).flat_map(move |p| rows.clone().map(move |row| row[p]))
}
