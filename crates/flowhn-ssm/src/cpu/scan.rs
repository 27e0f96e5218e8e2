//! The selective scan on the CPU: tiles of channels in parallel, chunks of tokens in turn.
// b batch, l seq_len, e d_inner, n d_state

use flowhn_nn::simd::{Real, dispatch};
use flowhn_torch::Result;
use flowhn_torch::cpu::{self, ColumnBlock};
use tch::Tensor;

use super::matrix::fold;
use super::recurrence::{self, Recurrence, Scanned};
use super::scan_tile::{CHUNK, Carried, Chunk, ChunkGrads, TILE, Trace, forward};
use super::view::{Rows, Source};
use super::{Inputs, map_tasks, reset_flags, sum_parts};
use crate::args::Carry;
use crate::scan::{DtActivation, SelectiveScan, SelectiveScanOutput};

/// Tiles whose gradients of `b` and `c` one task sums before it folds their lanes.
const GROUP: usize = 2;

/// Channels of one backward task.
const GROUP_CHANNELS: usize = GROUP * TILE;

/// Runs the scan on checked arguments with at least one token.
pub(crate) fn selective_scan(args: &SelectiveScan, carry: Carry) -> Result<SelectiveScanOutput> {
    let mut inputs = Inputs { tensors: vec![args.x_ble, args.dt_ble, args.a_en, args.b_bln, args.c_bln] };
    let function = Scan {
        d: inputs.push(args.d_e),
        z: inputs.push(args.z_ble),
        dt_bias: inputs.push(args.dt_bias_e),
        initial_state: inputs.push(args.initial_state_ben),
        dt_activation: args.dt_activation,
        reset: reset_flags(args.reset_bl)?,
    };
    let initial_state = function.initial_state;
    let (y_ble, final_state_ben) = recurrence::scan(function, &inputs.tensors, initial_state, carry)?;
    Ok(SelectiveScanOutput { y_ble, final_state_ben })
}

/// The custom function; optional inputs by their index.
struct Scan {
    d: Option<usize>,
    z: Option<usize>,
    dt_bias: Option<usize>,
    initial_state: Option<usize>,
    dt_activation: DtActivation,
    reset: Option<Vec<bool>>,
}

impl Recurrence for Scan {
    const NAME: &'static str = "selective_scan";

    /// `[batch, d_inner, d_state]`.
    fn state_size(inputs: &[&Tensor]) -> Vec<i64> {
        let (x, a) = (inputs[0].size(), inputs[2].size());
        vec![x[0], x[2], a[1]]
    }

    /// Chunk states are `[batch * tiles, chunks * d_state * TILE]`.
    fn run<R: Real>(&self, inputs: &[&Tensor], state: &mut [R], record: bool) -> Result<Scanned> {
        let sources = Sources::new::<R>(self, inputs);
        let operands = sources.operands::<R>(self)?;
        let shape = operands.shape;
        let n_tasks = shape.batch * shape.d_inner.div_ceil(TILE);
        let stored_len = if record { shape.seq_len.div_ceil(CHUNK) * shape.d_state * TILE } else { 0 };
        recurrence::build(
            &shape.x(),
            [n_tasks, stored_len],
            (state, shape.d_state),
            shape.work(),
            |y| shape.column_blocks(y, TILE),
            |batch_idx, y, stored, state| {
                dispatch(
                    #[inline(always)]
                    || operands.scan_tile(batch_idx, y, stored, state),
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
        let (grad_y, grad_state) = (Source::new::<R>(&grads[0]), grads[1].contiguous());
        let recorded = Recorded {
            chunk_states: cpu::slice::<R>(chunk_states)?,
            grad_y: grad_y.rows::<R>()?,
            grad_state: cpu::slice::<R>(&grad_state)?,
        };
        let shape = operands.shape;

        // The gradients of x, dt and z share one buffer, so that one closure can hand out all their blocks.
        let n_buffers = 2 + usize::from(self.z.is_some());
        let buffer_shape = [&[n_buffers as i64], &shape.x()[..]].concat();
        let (buffers, groups) = cpu::try_build(&buffer_shape, |buffers: &mut [R]| {
            let mut buffers = buffers.chunks_mut(buffers.len() / n_buffers);
            let mut blocks = || buffers.next().map(|rows| shape.column_blocks(rows, GROUP_CHANNELS).into_iter());
            let (x, dt, mut z) = (blocks(), blocks(), blocks());
            let tasks = x.into_iter().flatten().zip(dt.into_iter().flatten()).map(|((batch_idx, x), (_, dt))| {
                let z = z.as_mut().and_then(Iterator::next).map(|(_, z)| z);
                (batch_idx, GroupBlocks { x, dt, z })
            });
            Ok(map_tasks(tasks.collect(), shape.work(), |(batch_idx, blocks)| {
                dispatch(
                    #[inline(always)]
                    || operands.backward_group(batch_idx, blocks, &recorded),
                )
            }))
        })?;

        let per_channel = |part: fn(&GroupGrads<R>) -> &Vec<R>| {
            let of_sequence = |groups: &[GroupGrads<R>]| groups.iter().flat_map(|g| part(g).iter().copied()).collect();
            let parts: Vec<Vec<R>> = groups.chunks(shape.n_groups()).map(of_sequence).collect();
            sum_parts(&parts)
        };
        let per_state = |part: fn(&GroupGrads<R>) -> &Vec<R>| {
            let of_sequence = |groups: &[GroupGrads<R>]| sum_parts(groups.iter().map(part));
            groups.chunks(shape.n_groups()).flat_map(of_sequence).collect::<Vec<R>>()
        };
        let mut out: Vec<Option<Tensor>> = (0..inputs.len()).map(|_| None).collect();
        let mut put = |idx: Option<usize>, grad: Tensor| {
            if let Some(idx) = idx {
                out[idx] = Some(grad);
            }
        };
        put(Some(0), buffers.select(0, 0));
        put(Some(1), buffers.select(0, 1));
        put(Some(2), cpu::from_slice(&inputs[2].size(), &per_channel(|g| &g.a))?);
        put(Some(3), cpu::from_slice(&inputs[3].size(), &per_state(|g| &g.b))?);
        put(Some(4), cpu::from_slice(&inputs[4].size(), &per_state(|g| &g.c))?);
        put(self.d, cpu::from_slice(&[shape.d_inner as i64], &per_channel(|g| &g.d))?);
        put(self.dt_bias, cpu::from_slice(&[shape.d_inner as i64], &per_channel(|g| &g.dt_bias))?);
        if self.z.is_some() {
            put(self.z, buffers.select(0, 2));
        }
        if self.initial_state.is_some() {
            let initial: Vec<R> = groups.iter().flat_map(|g| g.initial.iter().copied()).collect();
            put(self.initial_state, cpu::from_slice(&shape.state(), &initial)?);
        }
        Ok(out)
    }
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: usize,
    seq_len: usize,
    d_inner: usize,
    d_state: usize,
}

impl Shape {
    fn x(self) -> [i64; 3] {
        [self.batch as i64, self.seq_len as i64, self.d_inner as i64]
    }

    fn state(self) -> [i64; 3] {
        [self.batch as i64, self.d_inner as i64, self.d_state as i64]
    }

    fn n_groups(self) -> usize {
        self.d_inner.div_ceil(GROUP_CHANNELS)
    }

    /// Updates of a state element.
    fn work(self) -> usize {
        self.batch * self.seq_len * self.d_inner * self.d_state
    }

    /// Cuts `[batch, seq_len, d_inner]` into blocks of channels of one sequence each, named by the sequence.
    fn column_blocks<R>(self, rows: &mut [R], width: usize) -> Vec<(usize, ColumnBlock<'_, R>)> {
        let sequences = rows.chunks_mut(self.seq_len * self.d_inner).enumerate();
        sequences
            .flat_map(|(batch_idx, rows)| {
                cpu::column_blocks(rows, self.d_inner, width).into_iter().map(move |block| (batch_idx, block))
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
    z: Option<Source>,
    a: Tensor,
    d: Option<Tensor>,
    dt_bias: Option<Tensor>,
}

impl Sources {
    fn new<R: Real>(scan: &Scan, inputs: &[&Tensor]) -> Self {
        let contiguous = |idx: Option<usize>| idx.map(|idx| inputs[idx].contiguous());
        Self {
            x: Source::new::<R>(inputs[0]),
            dt: Source::new::<R>(inputs[1]),
            b: Source::new::<R>(inputs[3]),
            c: Source::new::<R>(inputs[4]),
            z: scan.z.map(|z| Source::new::<R>(inputs[z])),
            a: inputs[2].contiguous(),
            d: contiguous(scan.d),
            dt_bias: contiguous(scan.dt_bias),
        }
    }

    fn operands<'a, R: Real>(&'a self, scan: &'a Scan) -> Result<Operands<'a, R>> {
        let (x, a) = (self.x.rows::<R>()?, self.a.size());
        let slice = |tensor: &'a Option<Tensor>| tensor.as_ref().map(cpu::slice::<R>).transpose();
        let [batch, seq_len, d_inner] = self.x.sizes();
        Ok(Operands {
            shape: Shape { batch, seq_len, d_inner, d_state: a[1] as usize },
            x,
            dt: self.dt.rows()?,
            b: self.b.rows()?,
            c: self.c.rows()?,
            z: self.z.as_ref().map(Source::rows).transpose()?,
            a: cpu::slice(&self.a)?,
            d: slice(&self.d)?,
            dt_bias: slice(&self.dt_bias)?,
            reset: scan.reset.as_deref(),
            dt_activation: scan.dt_activation,
        })
    }
}

/// The inputs as elements.
struct Operands<'a, R> {
    shape: Shape,
    x: Rows<'a, R>,
    dt: Rows<'a, R>,
    b: Rows<'a, R>,
    c: Rows<'a, R>,
    z: Option<Rows<'a, R>>,
    a: &'a [R],
    d: Option<&'a [R]>,
    dt_bias: Option<&'a [R]>,
    reset: Option<&'a [bool]>,
    dt_activation: DtActivation,
}

/// What the backward reads beside the inputs.
struct Recorded<'a, R> {
    chunk_states: &'a [R],
    grad_y: Rows<'a, R>,
    grad_state: &'a [R],
}

/// Where one backward task writes.
struct GroupBlocks<'a, R> {
    x: ColumnBlock<'a, R>,
    dt: ColumnBlock<'a, R>,
    z: Option<ColumnBlock<'a, R>>,
}

/// What one backward task sums for its channels.
struct GroupGrads<R> {
    a: Vec<R>,
    d: Vec<R>,
    dt_bias: Vec<R>,
    initial: Vec<R>,
    /// `[seq_len, d_state]`, this group's part.
    b: Vec<R>,
    c: Vec<R>,
}

/// Parameters of one tile, padded with zeros past the last channel.
struct TileParams<R> {
    a_ne: Vec<[R; TILE]>,
    d_e: [R; TILE],
    dt_bias_e: [R; TILE],
}

impl<R: Real> Operands<'_, R> {
    /// Scans the channels of `y` and advances their state `[channels, d_state]`.
    #[inline(always)]
    fn scan_tile(&self, batch_idx: usize, mut y: ColumnBlock<R>, stored: &mut [R], state_en: &mut [R]) {
        let Shape { seq_len, d_state, .. } = self.shape;
        let (start, width) = (y.start(), y.n_cols());
        let params = self.tile_params(start, width);
        let mut state = states_first(state_en, d_state, width);
        let mut chunk = Chunk::new(d_state);
        let mut y_qe = [[R::ZERO; TILE]; CHUNK];
        let mut z_qe = [[R::ZERO; TILE]; CHUNK];
        let mut stored = stored.chunks_exact_mut(d_state * TILE);
        for first in (0..seq_len).step_by(CHUNK) {
            if let Some(stored) = stored.next() {
                stored.copy_from_slice(state.as_flattened());
            }
            self.load_chunk(&mut chunk, batch_idx, first, start);
            chunk.activate(&params.dt_bias_e, self.dt_activation, false);
            forward(&chunk, &params.a_ne, &params.d_e, &mut state, &mut y_qe);
            if let Some(z) = &self.z {
                z.load(batch_idx, first, chunk.len, start, TILE, z_qe.as_flattened_mut());
                for (y, z) in y_qe[..chunk.len].as_flattened_mut().iter_mut().zip(z_qe.as_flattened()) {
                    *y *= z.silu();
                }
            }
            for (q, y_e) in y_qe[..chunk.len].iter().enumerate() {
                y.row(first + q).copy_from_slice(&y_e[..width]);
            }
        }
        for (out, value) in state_en.iter_mut().zip(channels_first(&state, width)) {
            *out = value;
        }
    }

    /// Gradients of a group of tiles, walking the chunks from the last to the first.
    #[inline(always)]
    fn backward_group(&self, batch_idx: usize, mut blocks: GroupBlocks<R>, recorded: &Recorded<R>) -> GroupGrads<R> {
        let Shape { seq_len, d_inner, d_state, .. } = self.shape;
        let (group_start, group_width) = (blocks.x.start(), blocks.x.n_cols());
        let n_chunks = seq_len.div_ceil(CHUNK);
        let mut tiles: Vec<_> = (0..group_width)
            .step_by(TILE)
            .map(|offset| {
                let (start, width) = (group_start + offset, TILE.min(group_width - offset));
                let mut carried = Carried::new(d_state);
                let grad_state = &recorded.grad_state[(batch_idx * d_inner + start) * d_state..];
                carried.state_ne = states_first(grad_state, d_state, width);
                (offset, width, self.tile_params(start, width), carried)
            })
            .collect();
        let mut chunk = Chunk::new(d_state);
        let mut trace = Trace::new(d_state);
        let mut grads = ChunkGrads::new(d_state, self.z.is_some());
        let (mut b, mut c) = (vec![R::ZERO; seq_len * d_state], vec![R::ZERO; seq_len * d_state]);

        for chunk_idx in (0..n_chunks).rev() {
            let first = chunk_idx * CHUNK;
            grads.b_qne.fill([R::ZERO; TILE]);
            grads.c_qne.fill([R::ZERO; TILE]);
            for (offset, width, params, carried) in &mut tiles {
                let start = group_start + *offset;
                let tile_idx = batch_idx * d_inner.div_ceil(TILE) + start / TILE;
                let stored = &recorded.chunk_states[(tile_idx * n_chunks + chunk_idx) * d_state * TILE..];
                trace.states[..d_state].as_flattened_mut().copy_from_slice(&stored[..d_state * TILE]);
                self.load_chunk(&mut chunk, batch_idx, first, start);
                chunk.activate(&params.dt_bias_e, self.dt_activation, true);
                recorded.grad_y.load(batch_idx, first, chunk.len, start, TILE, grads.y_qe.as_flattened_mut());
                if let (Some(z), Some(z_qe)) = (&self.z, &mut grads.z_qe) {
                    z.load(batch_idx, first, chunk.len, start, TILE, z_qe.as_flattened_mut());
                }
                trace.record(&chunk, &params.a_ne, &params.d_e);
                grads.backward(&chunk, &trace, &params.a_ne, &params.d_e, carried);

                let columns = *offset..*offset + *width;
                for q in 0..chunk.len {
                    blocks.x.row(first + q)[columns.clone()].copy_from_slice(&grads.x_qe[q][..*width]);
                    blocks.dt.row(first + q)[columns.clone()].copy_from_slice(&grads.dt_qe[q][..*width]);
                    if let (Some(z), Some(z_qe)) = (&mut blocks.z, &grads.z_qe) {
                        z.row(first + q)[columns.clone()].copy_from_slice(&z_qe[q][..*width]);
                    }
                }
            }
            let states = first * d_state..(first + chunk.len) * d_state;
            fold_lanes(&grads.b_qne, &mut b[states.clone()]);
            fold_lanes(&grads.c_qne, &mut c[states]);
        }

        let flatten = |part: fn(&Carried<R>) -> &[R; TILE]| -> Vec<R> {
            tiles.iter().flat_map(|(_, width, _, carried)| part(carried)[..*width].iter().copied()).collect()
        };
        GroupGrads {
            a: tiles.iter().flat_map(|(_, width, _, carried)| channels_first(&carried.a_ne, *width)).collect(),
            initial: tiles
                .iter()
                .flat_map(|(_, width, _, carried)| channels_first(&carried.state_ne, *width))
                .collect(),
            d: flatten(|carried| &carried.d_e),
            dt_bias: flatten(|carried| &carried.dt_bias_e),
            b,
            c,
        }
    }

    #[inline(always)]
    fn load_chunk(&self, chunk: &mut Chunk<R>, batch_idx: usize, first: usize, start: usize) {
        let Shape { seq_len, d_state, .. } = self.shape;
        let len = CHUNK.min(seq_len - first);
        chunk.len = len;
        self.x.load(batch_idx, first, len, start, TILE, chunk.x_qe.as_flattened_mut());
        self.dt.load(batch_idx, first, len, start, TILE, chunk.dt_qe.as_flattened_mut());
        self.b.load(batch_idx, first, len, 0, d_state, &mut chunk.b_qn);
        self.c.load(batch_idx, first, len, 0, d_state, &mut chunk.c_qn);
        if let Some(reset) = self.reset {
            chunk.reset_q[..len].copy_from_slice(&reset[batch_idx * seq_len + first..][..len]);
        }
    }

    #[inline(always)]
    fn tile_params(&self, start: usize, width: usize) -> TileParams<R> {
        let pad = |channels: Option<&[R]>| {
            let mut lanes = [R::ZERO; TILE];
            if let Some(channels) = channels {
                lanes[..width].copy_from_slice(&channels[start..start + width]);
            }
            lanes
        };
        TileParams {
            a_ne: states_first(&self.a[start * self.shape.d_state..], self.shape.d_state, width),
            d_e: pad(self.d),
            dt_bias_e: pad(self.dt_bias),
        }
    }
}

/// `[channels, d_state]` as `[d_state, TILE]`, zeros past the last channel.
#[inline(always)]
fn states_first<R: Real>(channels: &[R], d_state: usize, width: usize) -> Vec<[R; TILE]> {
    let mut out = vec![[R::ZERO; TILE]; d_state];
    for (e, states) in channels.chunks_exact(d_state).take(width).enumerate() {
        for (lanes, &value) in out.iter_mut().zip(states) {
            lanes[e] = value;
        }
    }
    out
}

/// `[d_state, TILE]` as `[width, d_state]`.
#[inline(always)]
fn channels_first<R: Real>(states: &[[R; TILE]], width: usize) -> impl Iterator<Item = R> {
    (0..width).flat_map(|e| states.iter().map(move |lanes| lanes[e]))
}

/// Adds up the lanes of each vector.
#[inline(always)]
fn fold_lanes<R: Real>(vectors: &[[R; TILE]], out: &mut [R]) {
    for (lanes, out) in vectors.iter().zip(out) {
        *out = fold(*lanes);
    }
}
