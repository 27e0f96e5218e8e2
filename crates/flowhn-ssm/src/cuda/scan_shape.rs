//! The host's half of `selective_scan_tile.cuh`: operands as the kernels take them, variants, grids and shared memory.
// b batch, l seq_len, e d_inner, n d_state

use flowhn_torch::kernel::rows::with_dense_rows;
use flowhn_torch::kernel::{Arg, kind_define};
use flowhn_torch::{DeviceProperties, Error, Result};
use tch::{Device, Kind, Tensor};

use super::scan::OP;

/// States that a channel's four lanes hold at once, `SLICE` in the kernels.
const SLICE: i64 = 16;
/// Widest state; more would need more shared memory than a block has.
const MAX_STATE: i64 = 256;
/// Warps of a team, `WARPS`.
const WARPS: i64 = 4;
/// Channels of a team.
const CHANNELS: i64 = 8 * WARPS;
/// Tokens between two recorded states, `CHUNK`: 4 bytes a state element in 64 tokens is an eighth of a bf16 input.
const CHUNK: i64 = 64;
/// Tokens of a tile of the forward kernels, `TILE`.
const TILE: i64 = 32;
/// Tokens that the backward keeps in registers, `STRIP`.
const STRIP: i64 = 8;
/// Room for the addresses of a sequence, `Sequence`.
const SEQUENCE_BYTES: i64 = 128;
/// Teams that a multiprocessor holds at once, as blocks of their own or as one block (`TEAMS`).
const RESIDENT_TEAMS: i64 = 3;
/// Strips after which a team hands its sums over, `HANDOVER`.
const HANDOVER: i64 = 4;
/// Shorter segments cost more in carries than they gain.
const MIN_SEGMENT: i64 = 256;

/// The macros of a variant.
pub(crate) type ScanDefines = [(&'static str, i64); 17];

/// What the macros of the kernels choose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScanVariant {
    /// Dtypes of x, dt, z, b, c: 0 f32, 1 bf16.
    pub(crate) kinds: [i64; 5],
    /// Whether pairs of channels, or of states, may be read at once.
    pub(crate) paired_channels: bool,
    pub(crate) paired_states: bool,
    pub(crate) softplus: bool,
    pub(crate) gated: bool,
    pub(crate) reset: bool,
    pub(crate) n_slices: i64,
    /// The direction of a carry.
    pub(crate) reverse: bool,
    /// Teams of a block of the backward: 1, or as many as fill a multiprocessor (one slice, compute capability 9.0).
    pub(crate) n_teams: i64,
}

impl ScanVariant {
    /// Mamba-1 with everything in one dtype.
    pub(crate) const fn mamba(kind: i64) -> Self {
        Self {
            kinds: [kind; 5],
            paired_channels: true,
            paired_states: true,
            softplus: true,
            gated: true,
            reset: false,
            n_slices: 1,
            reverse: false,
            n_teams: 1,
        }
    }

    pub(crate) const fn defines(self) -> ScanDefines {
        let [x, dt, z, b, c] = self.kinds;
        [
            ("X_KIND", x),
            ("DT_KIND", dt),
            ("Z_KIND", z),
            ("B_KIND", b),
            ("C_KIND", c),
            ("PAIRED_CHANNELS", self.paired_channels as i64),
            ("PAIRED_STATES", self.paired_states as i64),
            ("SOFTPLUS", self.softplus as i64),
            ("GATED", self.gated as i64),
            ("RESET", self.reset as i64),
            ("SLICES", self.n_slices),
            ("WARPS", WARPS),
            ("CHUNK", CHUNK),
            ("MIN_BLOCKS", if self.n_slices == 1 { RESIDENT_TEAMS / self.n_teams } else { 1 }),
            ("REVERSE", self.reverse as i64),
            ("TEAMS", self.n_teams),
            ("HANDOVER", if self.n_teams == 1 { CHUNK / STRIP } else { HANDOVER }),
        ]
    }
}

/// Which kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    Forward,
    Backward { n_teams: i64 },
    CarryForward,
    CarryBackward,
}

impl Pass {
    /// Teams of a block.
    fn n_teams(self) -> i64 {
        if let Pass::Backward { n_teams } = self { n_teams } else { 1 }
    }
}

/// Sizes of a scan.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) batch: i64,
    pub(super) seq_len: i64,
    pub(super) d_inner: i64,
    pub(super) d_state: i64,
}

impl Shape {
    pub(super) fn x(self) -> [i64; 3] {
        [self.batch, self.seq_len, self.d_inner]
    }

    pub(super) fn state(self) -> [i64; 3] {
        [self.batch, self.d_inner, self.d_state]
    }

    /// The states that the forward records: `[batch, chunks, groups of 4 states, d_inner, 4]`.
    pub(super) fn chunk_states(self) -> [i64; 5] {
        [self.batch, ceil_div(self.seq_len, CHUNK), 4 * self.n_slices(), self.d_inner, 4]
    }

    /// The parts of the gradients of B and C: `[blocks of channels, batch, seq_len, states of both]`.
    pub(super) fn state_parts(self, pass: Pass) -> [i64; 4] {
        [self.n_blocks(pass.n_teams()), self.batch, self.seq_len, 2 * SLICE * self.n_slices()]
    }

    fn n_blocks(self, n_teams: i64) -> i64 {
        ceil_div(self.d_inner, n_teams * CHANNELS)
    }

    fn n_slices(self) -> i64 {
        ceil_div(self.d_state, SLICE)
    }

    /// Number and length of the segments that fill a device of `n_multiprocessors`. Two segments would do the work of one and a
    /// half for the carries, so there are at least three or one.
    fn segments(self, n_multiprocessors: i64) -> (i64, i64) {
        let room = n_multiprocessors * RESIDENT_TEAMS / (self.n_blocks(1) * self.batch);
        let wanted = room.min(self.seq_len / MIN_SEGMENT);
        if wanted < 3 {
            return (1, self.seq_len);
        }
        let segment_len = ceil_div(ceil_div(self.seq_len, CHUNK), wanted) * CHUNK;
        (ceil_div(self.seq_len, segment_len), segment_len)
    }

    /// Whether blocks of three teams, one a multiprocessor, leave at most a tenth of the places of one round empty in the last.
    fn fills_multiprocessors(self, n_segments: i64, n_multiprocessors: i64) -> bool {
        let blocks = |n_teams| self.n_blocks(n_teams) * self.batch * n_segments;
        let places = n_multiprocessors * RESIDENT_TEAMS;
        let n_rounds = ceil_div(blocks(RESIDENT_TEAMS), n_multiprocessors);
        10 * (n_rounds * places - blocks(1)) <= places
    }
}

/// The inputs with dense rows, and what the kernels have to know about them.
#[derive(Debug)]
pub(super) struct Operands {
    shape: Shape,
    /// x, dt, b, c.
    activations: [Tensor; 4],
    z: Option<Tensor>,
    grad: Option<Tensor>,
    /// a, d, dt_bias, contiguous.
    parameters: [Option<Tensor>; 3],
    reset: Option<Tensor>,
    softplus: bool,
    /// What the device can do, if it is a CUDA device.
    properties: Option<&'static DeviceProperties>,
}

impl Operands {
    /// # Errors
    /// [`Error::Dtype`] for f64, [`Error::Invalid`] for sizes that a launch cannot count.
    pub(super) fn new(
        activations: [&Tensor; 4],
        z: Option<&Tensor>,
        parameters: [Option<&Tensor>; 3],
        reset: Option<&Tensor>,
        softplus: bool,
    ) -> Result<Self> {
        kind_define(OP, "x_ble", activations[0])?;
        let (batch, seq_len, d_inner) = activations[0].size3()?;
        let d_state = activations[2].size()[2];
        let limits = [
            ("d_state", d_state, MAX_STATE),
            ("batch", batch, 65_535),
            ("seq_len", seq_len, i64::from(i32::MAX) - CHUNK),
        ];
        for (name, size, limit) in limits {
            if size > limit {
                let message =
                    format!("{name} is {size}, the CUDA kernel takes at most {limit}: split it, or use the CPU");
                return Err(Error::invalid(OP, message));
            }
        }
        let properties = match activations[0].device() {
            Device::Cuda(device_idx) => Some(DeviceProperties::of(device_idx)?),
            _ => None,
        };
        let [x, dt, b, c] = activations.map(with_near_rows);
        let contiguous = |t: Option<&Tensor>| t.map(Tensor::f_contiguous).transpose();
        let [a, d, dt_bias] = parameters.map(contiguous);
        Ok(Self {
            shape: Shape { batch, seq_len, d_inner, d_state },
            activations: [x?, dt?, b?, c?],
            z: z.map(with_near_rows).transpose()?,
            grad: None,
            parameters: [a?, d?, dt_bias?],
            reset: reset.map(Tensor::shallow_clone),
            softplus,
            properties,
        })
    }

    /// The operands of the backward, with the gradient by the output.
    pub(super) fn with_grad(self, grad_ble: &Tensor) -> Result<Self> {
        Ok(Self { grad: Some(with_near_rows(grad_ble)?), ..self })
    }

    pub(super) fn shape(&self) -> Shape {
        self.shape
    }

    pub(super) fn device(&self) -> Device {
        self.activations[0].device()
    }

    /// Number and length of the segments.
    pub(super) fn segments(&self) -> (i64, i64) {
        let n_multiprocessors = self.properties.as_ref().map_or(1, |device| device.n_multiprocessors);
        self.shape.segments(n_multiprocessors.into())
    }

    /// The backward with the best number of teams: a block of three leaves a third of the parts to add up.
    pub(super) fn backward_pass(&self, n_segments: i64) -> Pass {
        let (one, three) = (Pass::Backward { n_teams: 1 }, Pass::Backward { n_teams: RESIDENT_TEAMS });
        let Some(device) = &self.properties else { return one };
        let has_room = device.compute_capability == 90
            && self.shape.n_slices() == 1
            && self.shared_bytes(three) as u64 <= device.shared_bytes_per_block;
        let fills = self.shape.fills_multiprocessors(n_segments, device.n_multiprocessors.into());
        if has_room && fills { three } else { one }
    }

    pub(super) fn grid(&self, pass: Pass, n_segments: i64) -> [u32; 3] {
        [self.shape.n_blocks(pass.n_teams()) as u32, n_segments as u32, self.shape.batch as u32]
    }

    pub(super) fn block(&self, pass: Pass) -> u32 {
        (32 * WARPS * pass.n_teams()) as u32
    }

    /// The macros of the variant.
    pub(super) fn defines(&self, pass: Pass) -> Result<ScanDefines> {
        let [x, dt, b, c] = &self.activations;
        let z = self.z.as_ref().unwrap_or(x);
        let even = |parts: &[Option<&Tensor>]| parts.iter().flatten().all(|t| pairs_are_aligned(t));
        let variant = ScanVariant {
            kinds: [
                kind_define(OP, "x_ble", x)?,
                kind_define(OP, "dt_ble", dt)?,
                kind_define(OP, "z_ble", z)?,
                kind_define(OP, "b_bln", b)?,
                kind_define(OP, "c_bln", c)?,
            ],
            paired_channels: even(&[Some(x), Some(dt), Some(z), self.grad.as_ref()]),
            paired_states: even(&[Some(b), Some(c)]),
            softplus: self.softplus,
            gated: self.z.is_some(),
            reset: self.reset.is_some(),
            n_slices: self.shape.n_slices(),
            reverse: pass == Pass::CarryBackward,
            n_teams: pass.n_teams(),
        };
        Ok(variant.defines())
    }

    /// Dynamic shared memory of a block, as the kernels lay it out.
    pub(super) fn shared_bytes(&self, pass: Pass) -> usize {
        let slices = self.shape.n_slices();
        let (threads, sum_stride) = (32 * WARPS, CHANNELS + 8);
        // Bytes of four states a thread, for each of `n` of them.
        let states = |n: i64| 16 * threads * n;
        let per_slice = |n: i64| if slices == 1 { 0 } else { states(n * slices) };
        let bytes = match pass {
            Pass::Forward => 4 * (TILE * (2 * CHANNELS + sum_stride) + 2 * TILE * SLICE) + per_slice(1),
            Pass::Backward { n_teams } => {
                // Steps, and where another slice still needs them, sums of their own.
                let words = CHUNK * CHANNELS * if slices == 1 { 1 } else { 2 };
                let warp_sums = 2 * WARPS * 2 * STRIP * SLICE;
                let team = 16 * words
                    + 4 * (2 * CHUNK * SLICE + warp_sums)
                    + states(CHUNK / STRIP + 1)
                    + SEQUENCE_BYTES
                    + per_slice(2);
                // What the teams but the last leave for it, and two barriers for each of four warps and each handover.
                let left = (n_teams - 1) * 4 * CHUNK * 2 * SLICE;
                let barriers = if n_teams == 1 { 0 } else { 2 * 8 * 4 * (CHUNK / STRIP / HANDOVER) };
                n_teams * team + left + barriers
            }
            Pass::CarryForward | Pass::CarryBackward => 4 * (TILE * 2 * CHANNELS + TILE * SLICE) + per_slice(2),
        };
        bytes as usize
    }

    /// Addresses, then strides of batch and token: the output's gradient if there is one, x, dt, z, b, c.
    pub(super) fn push_activations<'a>(&'a self, args: &mut Vec<Arg<'a>>) {
        let [x, dt, b, c] = &self.activations;
        let tensors = [Some(x), Some(dt), self.z.as_ref(), Some(b), Some(c)];
        push_rows(args, self.grad.as_ref().map(Some).into_iter().chain(tensors));
    }

    /// The same for the carry of one direction: x or the output's gradient, dt, z, b or c.
    pub(super) fn push_carry_activations<'a>(&'a self, args: &mut Vec<Arg<'a>>, pass: Pass) {
        let [x, dt, b, c] = &self.activations;
        let (driver, states) = if pass == Pass::CarryBackward { (self.grad.as_ref(), c) } else { (Some(x), b) };
        push_rows(args, [driver, Some(dt), self.z.as_ref(), Some(states)].into_iter());
        let [a, _, dt_bias] = &self.parameters;
        args.extend([Arg::opt(a.as_ref()), Arg::opt(dt_bias.as_ref())]);
    }

    /// a, d, dt_bias.
    pub(super) fn push_parameters<'a>(&'a self, args: &mut Vec<Arg<'a>>) {
        args.extend(self.parameters.iter().map(|p| Arg::opt(p.as_ref())));
    }

    pub(super) fn push_reset<'a>(&'a self, args: &mut Vec<Arg<'a>>) {
        push_rows(args, std::iter::once(self.reset.as_ref()));
    }

    pub(super) fn push_sizes(&self, args: &mut Vec<Arg>, segment_len: i64) {
        let Shape { seq_len, d_inner, d_state, .. } = self.shape;
        args.extend([seq_len, d_inner, d_state, segment_len].map(|size| Arg::I32(size as i32)));
    }
}

/// Addresses of tensors `[batch, seq_len, ..]`, then their strides of batch and token; null and zeros for one that is not there.
fn push_rows<'a>(args: &mut Vec<Arg<'a>>, tensors: impl Iterator<Item = Option<&'a Tensor>> + Clone) {
    args.extend(tensors.clone().map(Arg::opt));
    for tensor in tensors {
        let strides = tensor.map_or([0, 0], |t| [t.stride()[0], t.stride()[1]]);
        args.extend(strides.map(Arg::I64));
    }
}

/// The same tensor where its rows are dense and begin so near each other that 32 bits count the bytes, a copy where not.
fn with_near_rows(tensor: &Tensor) -> Result<Tensor> {
    let dense = with_dense_rows(tensor)?;
    Ok(if rows_are_near(&dense) { dense } else { dense.f_contiguous()? })
}

/// Whether 32 bits count the bytes from a row to the next.
pub(super) fn rows_are_near(tensor: &Tensor) -> bool {
    tensor.size()[1] < 2 || tensor.stride()[1] * (tensor.kind().elt_size_in_bytes() as i64) <= i64::from(u32::MAX)
}

/// Whether elements 2 i and 2 i + 1 of every row may be read at once.
fn pairs_are_aligned(t: &Tensor) -> bool {
    let (size, stride) = (t.size(), t.stride());
    let element: usize = if t.kind() == Kind::Float { 4 } else { 2 };
    let even = |axis: usize| size[axis] == 1 || stride[axis] % 2 == 0;
    size[2] % 2 == 0 && (t.data_ptr() as usize).is_multiple_of(2 * element) && even(0) && even(1)
}

fn ceil_div(a: i64, b: i64) -> i64 {
    (a + b - 1) / b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_three_teams_are_for_full_devices() {
        let fills = |batch, d_inner, n_segments| {
            Shape { batch, seq_len: 4096, d_inner, d_state: 16 }.fills_multiprocessors(n_segments, 132)
        };
        assert!(fills(8, 1536, 1) && fills(16, 1536, 1) && fills(1, 1536, 8));
        assert!(!fills(8, 2048, 1), "a second round with a third of the places taken");
        assert!(!fills(4, 768, 1), "less than a round");
        assert!(!fills(132, 32, 1), "one team in each block");
    }
}
