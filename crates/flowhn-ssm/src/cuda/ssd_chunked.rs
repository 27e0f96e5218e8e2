//! SSD in chunks of 64 tokens on the tensor cores.

use flowhn_torch::kernel::{Arg, Kernel};
use flowhn_torch::{DeviceProperties, Result};
use tch::{Device, Kind, Tensor};

use super::ssd::{Forward, Grads, Operands, Sizes, empty, strided};
use crate::kernels::{
    SSD_BACKWARD, SSD_BACKWARD_SM90, SSD_FORWARD, SSD_FORWARD_SM90, SSD_REDUCE, SSD_STATE, SSD_STATE_SM90, SSD_STEPS,
};

/// Tokens of a chunk.
const CHUNK: i64 = 64;
/// Four words a token.
const STEPS_BYTES: usize = 4 * CHUNK as usize * size_of::<f32>();
/// 64 rows of 64 bf16 values.
const PANEL_BYTES: usize = 64 * 64 * 2;
/// A segment has at least this many chunks: the pass that finds the state before it costs about half of what the segment costs.
const MIN_SEGMENT_CHUNKS: i64 = 8;
/// Most heads that one block of the backward takes: what it keeps of their steps has to fit into shared memory.
const MAX_PART_HEADS: i64 = 24;
/// Blocks of the backward, for every two multiprocessors, below which a block takes fewer heads.
const MIN_BACKWARD_BLOCKS: i64 = 3;

/// Writes the state after the last token into `final_state`.
pub(super) fn forward(operands: &Operands, final_state: &Tensor, recorded: bool) -> Result<Forward> {
    let Operands { sizes, x, b, c, .. } = operands;
    let tiles = Tiles::new(operands, &[x, b, c])?;
    let y = empty(&x.size(), x.kind(), x)?;
    let states = match recorded {
        true => Some(tiles.chunk_states(x)?),
        false => None,
    };
    let steps = tiles.steps(operands)?;
    let carried = match tiles.n_segments {
        1 => None,
        _ => Some(tiles.carried(&steps, x, b, operands.initial_state.as_ref(), Direction::Forward)?),
    };
    let args = [
        &strided(x)[..],
        &[Arg::Tensor(&steps)],
        &strided(b),
        &strided(c),
        &[Arg::opt(operands.d.as_ref()), Arg::opt(carried.as_ref().or(operands.initial_state.as_ref()))],
        &[Arg::Tensor(&y), Arg::opt(states.as_ref()), Arg::Tensor(final_state)],
        &sizes.args(),
        &tiles.segment_args(),
    ];
    let grid = [tiles.segment_blocks(), 1, 1];
    if tiles.hopper {
        let kernel = Kernel { source: &SSD_FORWARD_SM90, entry: "ssd_forward_sm90", defines: &[] };
        kernel.launch(grid, 128, 2 * 5 * PANEL_BYTES + 2 * PANEL_BYTES + 2 * STEPS_BYTES, &args.concat())?;
    } else {
        let kernel = Kernel { source: &SSD_FORWARD, entry: "ssd_forward", defines: &tiles.defines() };
        kernel.launch(grid, 256, tiles.forward_shared_bytes(), &args.concat())?;
    }
    Ok(Forward { y, saved: states.map_or_else(Vec::new, |states| vec![states, steps]) })
}

/// The gradients; that of `x` goes into `grad_x`, whose last axis is dense.
pub(super) fn backward(
    operands: &Operands,
    [states, steps]: [&Tensor; 2],
    grad_y: &Tensor,
    grad_state: Option<&Tensor>,
    grad_x: Tensor,
    wants_initial: bool,
) -> Result<Grads> {
    let Operands { sizes, x, dt, b, c, .. } = operands;
    let tiles = Tiles::new(operands, &[x, b, c, grad_y, &grad_x])?;
    let carried = match tiles.n_segments {
        1 => None,
        _ => Some(tiles.carried(steps, grad_y, c, grad_state, Direction::Reverse)?),
    };
    let grad_states = tiles.chunk_states(x)?;
    let first = match wants_initial {
        true => Some(tiles.segment_states(x)?),
        false => None,
    };
    let pass = StatePass {
        x: grad_y,
        steps,
        b: c,
        initial: carried.as_ref().or(grad_state),
        states: Some(&grad_states),
        last: first.as_ref(),
        decays: None,
    };
    tiles.state_pass(&pass, Direction::Reverse)?;

    let grad_dt = empty(&dt.size(), dt.kind(), x)?;
    let part_heads = tiles.part_heads();
    let n_parts = div_ceil(sizes.group_heads(), part_heads);
    let sums = Sums::new(operands, n_parts, sizes.batch * tiles.n_chunks)?;
    let args = [
        &strided(x)[..],
        &[Arg::Tensor(steps), Arg::Tensor(&operands.a)],
        &strided(b),
        &strided(c),
        &[Arg::opt(operands.d.as_ref())],
        &strided(grad_y),
        &[Arg::Tensor(states), Arg::Tensor(&grad_states)],
        &strided(&grad_x),
        &[Arg::Tensor(&grad_dt)],
        &sums.args(),
        &[Arg::I32(sizes.batch as i32)],
        &sizes.args(),
        &[Arg::I32(tiles.p_blocks as i32), Arg::I32(part_heads as i32), operands.activate()],
    ];
    let n_blocks = sizes.batch * tiles.n_chunks * sizes.n_groups * n_parts;
    let grid = [n_blocks as u32, 1, 1];
    if tiles.hopper {
        let defines = [("DT_KIND", operands.dt_kind()?)];
        let kernel = Kernel { source: &SSD_BACKWARD_SM90, entry: "ssd_backward_sm90", defines: &defines };
        kernel.launch(grid, 256, Tiles::backward_sm90_shared_bytes(part_heads), &args.concat())?;
    } else {
        let defines = tiles.backward_defines(operands)?;
        let kernel = Kernel { source: &SSD_BACKWARD, entry: "ssd_backward", defines: &defines };
        kernel.launch(grid, 512, tiles.backward_shared_bytes(part_heads), &args.concat())?;
    }
    let (b, c, per_head) = sums.reduce()?;
    let initial_state = first.map(|first| first.select(1, 0));
    Ok(Grads { x: grad_x, dt: grad_dt, b, c, per_head, initial_state })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Reverse,
}

/// What one run of the kernel `ssd_state` reads and writes.
struct StatePass<'a> {
    x: &'a Tensor,
    steps: &'a Tensor,
    b: &'a Tensor,
    initial: Option<&'a Tensor>,
    states: Option<&'a Tensor>,
    last: Option<&'a Tensor>,
    decays: Option<&'a Tensor>,
}

/// How a call is cut into blocks, chunks and segments.
struct Tiles {
    sizes: Sizes,
    p_tile: i64,
    n_tile: i64,
    aligned: bool,
    /// Whether the kernels with Hopper's own instructions fit.
    hopper: bool,
    p_blocks: i64,
    n_chunks: i64,
    n_segments: i64,
    segment_chunks: i64,
    n_multiprocessors: i64,
}

impl Tiles {
    /// `rows` are the bf16 tensors whose rows are copied to shared memory.
    fn new(operands: &Operands, rows: &[&Tensor]) -> Result<Self> {
        let sizes = operands.sizes;
        let p_tile = if sizes.d_head <= 32 { 32 } else { 64 };
        let p_blocks = div_ceil(sizes.d_head, p_tile);
        let n_chunks = div_ceil(sizes.seq_len, CHUNK);
        let device_idx = match operands.x.device() {
            Device::Cuda(device_idx) => device_idx,
            _ => 0,
        };
        let properties = DeviceProperties::of(device_idx)?;
        let n_multiprocessors = i64::from(properties.n_multiprocessors);
        let n_tile = sizes.state_tile();
        let aligned = sizes.d_state % 8 == 0 && rows.iter().all(|t| aligned(t));
        // Few heads and a long sequence: segments that run side by side, two blocks a multiprocessor.
        let blocks = sizes.batch * sizes.n_heads * p_blocks;
        let segments = (2 * n_multiprocessors / blocks).min(n_chunks / MIN_SEGMENT_CHUNKS).max(1);
        let segment_chunks = div_ceil(n_chunks, segments);
        Ok(Self {
            sizes,
            p_tile,
            n_tile,
            aligned,
            hopper: properties.compute_capability == 90 && aligned && p_tile == 64 && n_tile == 128,
            p_blocks,
            n_chunks,
            n_segments: div_ceil(n_chunks, segment_chunks),
            segment_chunks,
            n_multiprocessors,
        })
    }

    fn defines(&self) -> [(&'static str, i64); 3] {
        [("P_TILE", self.p_tile), ("N_TILE", self.n_tile), ("ALIGNED", self.aligned.into())]
    }

    fn state_defines(&self, direction: Direction) -> [(&'static str, i64); 4] {
        let [p_tile, n_tile, aligned] = self.defines();
        [p_tile, n_tile, aligned, ("REVERSE", (direction == Direction::Reverse).into())]
    }

    fn backward_defines(&self, operands: &Operands) -> Result<[(&'static str, i64); 4]> {
        let [p_tile, n_tile, aligned] = self.defines();
        Ok([p_tile, n_tile, aligned, ("DT_KIND", operands.dt_kind()?)])
    }

    fn segment_args(&self) -> [Arg<'static>; 3] {
        [self.p_blocks, self.n_segments, self.segment_chunks].map(|n| Arg::I32(n as i32))
    }

    fn segment_blocks(&self) -> u32 {
        (self.sizes.batch * self.n_segments * self.sizes.n_heads * self.p_blocks) as u32
    }

    fn tile_bytes(cols: i64, rows: i64) -> usize {
        (rows * (cols + 8) * 2) as usize
    }

    fn forward_shared_bytes(&self) -> usize {
        let stage = 2 * Self::tile_bytes(self.n_tile, CHUNK) + Self::tile_bytes(self.p_tile, CHUNK) + STEPS_BYTES;
        // Two stages, the state, 10 blocks of operands.
        2 * stage + Self::tile_bytes(self.n_tile, self.p_tile) + 10 * 512
    }

    fn state_shared_bytes(&self) -> usize {
        3 * (Self::tile_bytes(self.n_tile, CHUNK) + Self::tile_bytes(self.p_tile, CHUNK) + STEPS_BYTES)
    }

    fn backward_shared_bytes(&self, part_heads: i64) -> usize {
        let stages = if self.n_tile <= 128 { 2 } else { 1 };
        let stage = 2 * Self::tile_bytes(self.p_tile, CHUNK) + 2 * Self::tile_bytes(self.n_tile, self.p_tile);
        // What warps find out about two heads, and the steps of all heads.
        let scalars = 2 * (8 * CHUNK + 16) + part_heads * 4 * CHUNK;
        2 * Self::tile_bytes(self.n_tile, CHUNK) + stages * stage + scalars as usize * size_of::<f32>()
    }

    fn backward_sm90_shared_bytes(part_heads: i64) -> usize {
        // b and c, two stages of x, dy and two states; then as above.
        let scalars = 2 * (6 * CHUNK + 8) + part_heads * 4 * CHUNK;
        16 * PANEL_BYTES + scalars as usize * size_of::<f32>()
    }

    /// Heads that a block of the backward takes: as many as leave blocks enough to fill the chip evenly.
    fn part_heads(&self) -> i64 {
        let group_heads = self.sizes.group_heads();
        let blocks =
            |part_heads| self.sizes.batch * self.n_chunks * self.sizes.n_groups * div_ceil(group_heads, part_heads);
        let mut most = group_heads.min(MAX_PART_HEADS);
        while most > 4 && 2 * blocks(most) < MIN_BACKWARD_BLOCKS * self.n_multiprocessors {
            most = div_ceil(most, 2);
        }
        // As even as the number of blocks allows.
        div_ceil(group_heads, div_ceil(group_heads, most))
    }

    /// Step sizes and decays of all chunks.
    fn steps(&self, operands: &Operands) -> Result<Tensor> {
        let Sizes { batch, seq_len, n_heads, .. } = self.sizes;
        let n_all = batch * self.n_chunks * n_heads;
        let steps = empty(&[batch, self.n_chunks, n_heads, 4, CHUNK], Kind::Float, &operands.x)?;
        let args = [
            &strided(&operands.dt)[..],
            &[Arg::Tensor(&operands.a), Arg::opt(operands.dt_bias.as_ref()), Arg::opt(operands.reset.as_ref())],
            &[
                Arg::Tensor(&steps),
                Arg::I32(seq_len as i32),
                Arg::I32(n_heads as i32),
                Arg::I64(n_all),
                operands.activate(),
            ],
        ];
        let defines = [("DT_KIND", operands.dt_kind()?)];
        let n_blocks = div_ceil(n_all, 8) as u32;
        Kernel { source: &SSD_STEPS, entry: "ssd_steps", defines: &defines }.launch(
            [n_blocks, 1, 1],
            256,
            0,
            &args.concat(),
        )?;
        Ok(steps)
    }

    /// bf16 states of all chunks.
    fn chunk_states(&self, like: &Tensor) -> Result<Tensor> {
        let Sizes { batch, n_heads, d_head, d_state, .. } = self.sizes;
        empty(&[batch, self.n_chunks, n_heads, d_head, d_state], Kind::BFloat16, like)
    }

    /// f32 states of all segments.
    fn segment_states(&self, like: &Tensor) -> Result<Tensor> {
        let Sizes { batch, n_heads, d_head, d_state, .. } = self.sizes;
        empty(&[batch, self.n_segments, n_heads, d_head, d_state], Kind::Float, like)
    }

    /// The state that comes to each segment.
    fn carried(
        &self,
        steps: &Tensor,
        x: &Tensor,
        b: &Tensor,
        initial: Option<&Tensor>,
        direction: Direction,
    ) -> Result<Tensor> {
        let Sizes { batch, n_heads, d_head, d_state, .. } = self.sizes;
        let states = self.segment_states(x)?;
        let decays = empty(&[batch, self.n_segments, n_heads], Kind::Float, x)?;
        let pass = StatePass { x, steps, b, initial: None, states: None, last: Some(&states), decays: Some(&decays) };
        self.state_pass(&pass, direction)?;
        let args = [
            Arg::Tensor(&states),
            Arg::Tensor(&decays),
            Arg::opt(initial),
            Arg::I32(self.n_segments as i32),
            Arg::I32(n_heads as i32),
            Arg::I32((d_head * d_state) as i32),
        ];
        let n_blocks = div_ceil(n_heads * d_head * d_state, 256);
        Kernel { source: &SSD_STATE, entry: "ssd_carry", defines: &self.state_defines(direction) }.launch(
            [n_blocks as u32, batch as u32, 1],
            256,
            0,
            &args,
        )?;
        Ok(states)
    }

    fn state_pass(&self, pass: &StatePass, direction: Direction) -> Result<()> {
        let args = [
            &strided(pass.x)[..],
            &[Arg::Tensor(pass.steps)],
            &strided(pass.b),
            &[Arg::opt(pass.initial), Arg::opt(pass.states), Arg::opt(pass.last), Arg::opt(pass.decays)],
            &self.sizes.args(),
            &self.segment_args(),
        ];
        let grid = [self.segment_blocks(), 1, 1];
        if self.hopper {
            let defines = [("REVERSE", (direction == Direction::Reverse).into())];
            let kernel = Kernel { source: &SSD_STATE_SM90, entry: "ssd_state_sm90", defines: &defines };
            kernel.launch(grid, 128, 3 * (3 * PANEL_BYTES + STEPS_BYTES), &args.concat())
        } else {
            let kernel = Kernel { source: &SSD_STATE, entry: "ssd_state", defines: &self.state_defines(direction) };
            kernel.launch(grid, 256, self.state_shared_bytes(), &args.concat())
        }
    }
}

/// Whether every row of the tensor begins at 16 bytes and is a whole number of them.
fn aligned(tensor: &Tensor) -> bool {
    let (size, stride) = (tensor.size(), tensor.stride());
    let n_outer = size.len() - 1;
    let rows = (0..n_outer).all(|axis| size[axis] == 1 || stride[axis] % 8 == 0);
    rows && size[n_outer] % 8 == 0 && (tensor.data_ptr() as usize).is_multiple_of(16)
}

/// The gradients that many blocks add to, as parts in memory: each part's sum is made by one block, and the sum of the parts, in
/// order, by `ssd_reduce`.
pub(super) struct Sums {
    kind: Kind,
    /// Gradients of `a`, `d` and the bias, `[3, rows, n_heads]`.
    heads: Tensor,
    n_rows: i64,
    /// `[parts, batch, seq_len, n_groups, d_state]`; the gradients themselves if there is one part.
    b: Tensor,
    c: Tensor,
}

impl Sums {
    pub(super) fn new(operands: &Operands, n_parts: i64, n_rows: i64) -> Result<Self> {
        let Sizes { batch, seq_len, n_heads, n_groups, d_state, .. } = operands.sizes;
        let kind = operands.x.kind();
        let part_kind = if n_parts == 1 { kind } else { Kind::Float };
        let parts = || empty(&[n_parts, batch, seq_len, n_groups, d_state], part_kind, &operands.x);
        let heads = empty(&[3, n_rows, n_heads], Kind::Float, &operands.x)?;
        Ok(Self { kind, heads, n_rows, b: parts()?, c: parts()? })
    }

    /// Where a kernel writes: `db, dc, sums`.
    pub(super) fn args(&self) -> [Arg<'_>; 3] {
        [Arg::Tensor(&self.b), Arg::Tensor(&self.c), Arg::Tensor(&self.heads)]
    }

    /// Gradients of `b` and `c`, and of `a`, `d` and the bias.
    pub(super) fn reduce(self) -> Result<(Tensor, Tensor, [Tensor; 3])> {
        let n_heads = self.heads.size()[2];
        let one = || empty(&[n_heads], Kind::Float, &self.heads);
        let per_head = [one()?, one()?, one()?];
        let parts = self.b.size();
        let (n_parts, size) = (parts[0], parts[1..].iter().product::<i64>());
        let whole = |parts: &Tensor| match n_parts {
            1 => Ok(parts.select(0, 0)),
            _ => empty(&parts.size()[1..], self.kind, parts),
        };
        let (b, c) = (whole(&self.b)?, whole(&self.c)?);
        let part_blocks = if n_parts == 1 { 0 } else { 2 * div_ceil(size, 1024) };
        let args = [
            Arg::Tensor(&self.heads),
            Arg::Tensor(&per_head[0]),
            Arg::Tensor(&per_head[1]),
            Arg::Tensor(&per_head[2]),
            Arg::I64(self.n_rows),
            Arg::I32(n_heads as i32),
            Arg::Tensor(&self.b),
            Arg::Tensor(&self.c),
            Arg::Tensor(&b),
            Arg::Tensor(&c),
            Arg::I64(size),
            Arg::I32(n_parts as i32),
        ];
        let defines = [("OUT_KIND", i64::from(self.kind == Kind::BFloat16))];
        Kernel { source: &SSD_REDUCE, entry: "ssd_reduce", defines: &defines }.launch(
            [(3 * n_heads + part_blocks) as u32, 1, 1],
            256,
            0,
            &args,
        )?;
        Ok((b, c, per_head))
    }
}

fn div_ceil(a: i64, b: i64) -> i64 {
    (a + b - 1) / b
}
