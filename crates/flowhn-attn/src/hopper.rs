//! Attention of whole sequences on Hopper by kernels of our own (`docs/kernels/attention.md`): heads of 64 in bf16, causal, within
//! documents and windows, or all of it. Equal runs give equal bits.

// b batch, n tokens, t those of whole tiles, h query heads, k key heads, p d_head

use tch::{Device, Kind, Tensor};

use flowhn_torch::kernel::{Arg, Boxes, Defines, Kernel};
use flowhn_torch::{BackwardCtx, DeviceProperties, Error, ForwardCtx, Function, Result, apply};

use crate::kernels::{ATTENTION_DKV, ATTENTION_DQ, ATTENTION_FORWARD, SPANS};
use crate::mask::Pattern;

/// The width of a head.
const D_HEAD: i64 = 64;
/// Queries, or keys, of a tile.
const TILE: i64 = 128;
/// A group of four warps, of which one thread copies, and two that multiply.
const N_THREADS: u32 = 384;
/// Rows that a warp stores at a time.
const STORED_ROWS: u32 = 16;
/// Threads of the kernel that says where spans begin and end.
const SPANS_THREADS: i64 = 256;

/// What shared memory holds for one of the kernels.
struct Memory {
    /// Slots of the ring.
    n_stages: usize,
    /// Tiles of the rows that a block works for, and numbers of each such row.
    own: [usize; 2],
    /// Numbers of each row that comes and goes.
    ring_numbers: usize,
}

const FORWARD: Memory = Memory { n_stages: 4, own: [1, 0], ring_numbers: 0 };
const DQ: Memory = Memory { n_stages: 3, own: [3, 1], ring_numbers: 0 };
const DKV: Memory = Memory { n_stages: 3, own: [2, 0], ring_numbers: 2 };

impl Memory {
    /// As `Layout` of `attention_sm90.cuh`: two slots of the block's own rows, the ring of pairs of tiles, and their barriers.
    fn n_bytes(&self, sees: Sees) -> usize {
        let tile = (TILE * D_HEAD) as usize * size_of::<u16>();
        let numbers = TILE as usize * size_of::<f32>();
        let [own_tiles, own_numbers] = self.own;
        let own_numbers = own_numbers + usize::from(sees == Sees::Spans);
        let barriers = 2 * size_of::<u64>();
        2 * (own_tiles * tile + own_numbers * numbers + barriers)
            + self.n_stages * (2 * tile + self.ring_numbers * numbers + barriers)
    }
}

/// What a query sees: every key, those up to its own position, or of these the ones from some key on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sees {
    All,
    Causal,
    Spans,
}

/// The macros of a kernel.
type Macros = [(&'static str, i64); 2];

const fn macros(memory: &Memory, sees: Sees) -> Macros {
    [("STAGES", memory.n_stages as i64), ("SEES", sees as i64)]
}

/// The variants of each kernel.
pub(crate) const FORWARD_VARIANTS: &[Defines] =
    &[&macros(&FORWARD, Sees::All), &macros(&FORWARD, Sees::Causal), &macros(&FORWARD, Sees::Spans)];
/// See [`FORWARD_VARIANTS`].
pub(crate) const DQ_VARIANTS: &[Defines] =
    &[&macros(&DQ, Sees::All), &macros(&DQ, Sees::Causal), &macros(&DQ, Sees::Spans)];
/// See [`FORWARD_VARIANTS`].
pub(crate) const DKV_VARIANTS: &[Defines] =
    &[&macros(&DKV, Sees::All), &macros(&DKV, Sees::Causal), &macros(&DKV, Sees::Spans)];

/// Whether the kernels take these queries, keys and values, `[b, n, h, p]` and twice `[b, n, k, p]`: bf16 on compute capability 9.0, heads of
/// 64 that begin at multiples of 16 bytes.
pub(crate) fn takes(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<bool> {
    let Device::Cuda(device_idx) = q.device() else { return Ok(false) };
    let size = q.size();
    let n_tiles = padded(size[1]) / TILE * size[0] * size[2];
    Ok(size[3] == D_HEAD
        && k.size()[1] == size[1]
        && i32::try_from(n_tiles).is_ok()
        && [q, k, v].iter().all(|heads| fits(heads))
        && DeviceProperties::of(device_idx)?.compute_capability == 90)
}

/// Attention of what [`takes`] accepted; returns `[b, n, h, p]`, contiguous.
pub(crate) fn attend(inputs: [&Tensor; 3], pattern: &Pattern) -> Result<Tensor> {
    let (sees, spans) = match pattern {
        Pattern::All => (Sees::All, None),
        Pattern::Causal => (Sees::Causal, None),
        Pattern::Spans { segments_bn, window } => {
            let size = inputs[0].size();
            let spans = Spans::of([size[0], size[1]], inputs[0].device(), segments_bn.as_ref(), *window)?;
            (Sees::Spans, Some(spans))
        }
        Pattern::Window(_) | Pattern::Dense(_) => {
            return Err(Error::invalid(Attention::NAME, "these kernels read no masks"));
        }
    };
    let scale = (D_HEAD as f64).sqrt().recip() as f32;
    Ok(apply(Attention { sees, spans, scale }, &inputs)?.swap_remove(0))
}

/// The first key that each query sees and the last query that sees each key, `[b, padded(n)]`, i32.
struct Spans {
    first_keys_bt: Tensor,
    last_queries_bt: Tensor,
}

impl Spans {
    fn of([batch, n]: [i64; 2], device: Device, segments_bn: Option<&Tensor>, window: Option<i64>) -> Result<Self> {
        let segments_bn = segments_bn.map(|segments| segments.f_contiguous()).transpose()?;
        let empty = || Tensor::f_empty([batch, padded(n)], (Kind::Int, device));
        let (first_keys_bt, last_queries_bt) = (empty()?, empty()?);
        Kernel { source: &SPANS, entry: "spans", defines: &[] }.launch(
            [batch as u32, ((padded(n) + SPANS_THREADS - 1) / SPANS_THREADS) as u32, 1],
            SPANS_THREADS as u32,
            0,
            &[
                Arg::opt(segments_bn.as_ref()),
                Arg::Tensor(&first_keys_bt),
                Arg::Tensor(&last_queries_bt),
                Arg::I32(n as i32),
                Arg::I32(padded(n) as i32),
                Arg::I32(window.map_or(0, |window| window.min(n) as i32)),
            ],
        )?;
        Ok(Self { first_keys_bt, last_queries_bt })
    }
}

/// Its inputs are queries, keys and values.
struct Attention {
    sees: Sees,
    spans: Option<Spans>,
    scale: f32,
}

impl Attention {
    /// Launches a kernel with tiles of `n_heads` heads; what comes before the numbers that all three kernels take is `args`.
    fn launch(&self, kernel: &Kernel, memory: &Memory, shape: &Shape, n_heads: i64, mut args: Vec<Arg>) -> Result<()> {
        let &Shape { batch, n, group_size, device_idx, .. } = shape;
        args.extend([batch, n_heads, group_size, n].map(|number| Arg::I32(number as i32)));
        args.push(Arg::F32(self.scale));
        let n_tiles = batch * n_heads * (padded(n) / TILE);
        let n_blocks = n_tiles.min(i64::from(DeviceProperties::of(device_idx)?.n_multiprocessors));
        kernel.launch([n_blocks as u32, 1, 1], N_THREADS, memory.n_bytes(self.sees), &args)
    }

    /// What a kernel reads of the spans, if there are any.
    fn spans(&self, which: impl Fn(&Spans) -> &Tensor) -> Arg<'_> {
        Arg::opt(self.spans.as_ref().map(which))
    }
}

/// How many there are of everything.
struct Shape {
    batch: i64,
    n: i64,
    n_heads: i64,
    n_kv_heads: i64,
    group_size: i64,
    device_idx: usize,
}

impl Shape {
    fn of(q_bnhp: &Tensor, k_bnkp: &Tensor) -> Result<Self> {
        let Device::Cuda(device_idx) = q_bnhp.device() else {
            return Err(Error::invalid(Attention::NAME, "these kernels run on a CUDA device"));
        };
        let ((batch, n, n_heads, _), n_kv_heads) = (q_bnhp.size4()?, k_bnkp.size()[2]);
        Ok(Self { batch, n, n_heads, n_kv_heads, group_size: n_heads / n_kv_heads, device_idx })
    }

    /// An f32 for each query, `[b, h, padded(n)]`.
    fn numbers(&self) -> Result<Tensor> {
        let device = Device::Cuda(self.device_idx);
        Ok(Tensor::f_empty([self.batch, self.n_heads, padded(self.n)], (Kind::Float, device))?)
    }
}

impl Function for Attention {
    const NAME: &'static str = "attention";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let shape = Shape::of(inputs[0], inputs[1])?;
        let o_bnhp = Tensor::f_empty(inputs[0].size(), (Kind::BFloat16, inputs[0].device()))?;
        let log_sums_bht = ctx.is_recorded().then(|| shape.numbers()).transpose()?;
        let [q, k, v, o] = heads_first([inputs[0], inputs[1], inputs[2], &o_bnhp])?;
        let kernel =
            Kernel { source: &ATTENTION_FORWARD, entry: "attention_forward", defines: &macros(&FORWARD, self.sees) };
        let args = vec![
            tiles(&q),
            tiles(&k),
            tiles(&v),
            stored(&o),
            Arg::opt(log_sums_bht.as_ref()),
            self.spans(|spans| &spans.first_keys_bt),
        ];
        self.launch(&kernel, &FORWARD, &shape, shape.n_heads, args)?;
        if let Some(log_sums_bht) = &log_sums_bht {
            for tensor in [inputs[0], inputs[1], inputs[2], &o_bnhp, log_sums_bht] {
                ctx.save(tensor);
            }
        }
        Ok(vec![o_bnhp])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [q_bnhp, k_bnkp, v_bnkp, o_bnhp, log_sums_bht] = ctx.saved() else {
            return Err(Error::invalid(Self::NAME, "the saved tensors are not five"));
        };
        let shape = Shape::of(q_bnhp, k_bnkp)?;
        let deltas_bht = shape.numbers()?;
        let dout_bnhp = if fits(&grads[0]) { grads[0].shallow_clone() } else { dense(&grads[0])? };
        let grad = |input_idx: usize, input: &Tensor| -> Result<Tensor> {
            let place = ctx.grad_place(input_idx, input)?;
            // A place between others may begin anywhere.
            Ok(if fits(&place) { place } else { Tensor::f_empty(input.size(), (input.kind(), input.device()))? })
        };
        let dq_bnhp = grad(0, q_bnhp)?;
        let [q, k, v, o] = heads_first([q_bnhp, k_bnkp, v_bnkp, o_bnhp])?;
        let [dout, dq] = heads_first([&dout_bnhp, &dq_bnhp])?;

        let kernel = Kernel { source: &ATTENTION_DQ, entry: "attention_dq", defines: &macros(&DQ, self.sees) };
        let mut args = vec![tiles(&q), tiles(&k), tiles(&v), tiles(&o), tiles(&dout), stored(&dq)];
        args.extend([Arg::Tensor(log_sums_bht), Arg::Tensor(&deltas_bht)]);
        args.push(self.spans(|spans| &spans.first_keys_bt));
        self.launch(&kernel, &DQ, &shape, shape.n_heads, args)?;
        if !ctx.needs_grad(1) && !ctx.needs_grad(2) {
            return Ok(vec![Some(dq_bnhp), None, None]);
        }
        let (dk_bnkp, dv_bnkp) = (grad(1, k_bnkp)?, grad(2, v_bnkp)?);
        let [dk, dv] = heads_first([&dk_bnkp, &dv_bnkp])?;
        let kernel = Kernel { source: &ATTENTION_DKV, entry: "attention_dkv", defines: &macros(&DKV, self.sees) };
        let mut args = vec![tiles(&q), tiles(&k), tiles(&v), tiles(&dout), stored(&dk), stored(&dv)];
        args.extend([Arg::Tensor(log_sums_bht), Arg::Tensor(&deltas_bht)]);
        args.push(self.spans(|spans| &spans.last_queries_bt));
        self.launch(&kernel, &DKV, &shape, shape.n_kv_heads, args)?;
        Ok(vec![Some(dq_bnhp), Some(dk_bnkp), Some(dv_bnkp)])
    }
}

/// Rows of whole tiles.
fn padded(n: i64) -> i64 {
    (n + TILE - 1) / TILE * TILE
}

fn tiles(heads: &Tensor) -> Arg<'_> {
    Arg::Boxes(Boxes { matrix: heads, n_rows: TILE as u32 })
}

fn stored(heads: &Tensor) -> Arg<'_> {
    Arg::Boxes(Boxes { matrix: heads, n_rows: STORED_ROWS })
}

/// Stacks of matrices, `[b, heads, n, p]`, of `[b, n, heads, p]`.
fn heads_first<const N: usize>(tensors: [&Tensor; N]) -> Result<[Tensor; N]> {
    let views = tensors.iter().map(|x| Ok(x.f_transpose(1, 2)?)).collect::<Result<Vec<Tensor>>>()?;
    Ok(views.try_into().expect("as many as there were"))
}

/// Whether kernels can copy boxes of these heads.
fn fits(heads_bnhp: &Tensor) -> bool {
    let (size, stride) = (heads_bnhp.size(), heads_bnhp.stride());
    let leads_to_16_bytes = |axis: usize| size[axis] == 1 || stride[axis] % 8 == 0 && stride[axis] >= size[3];
    heads_bnhp.kind() == Kind::BFloat16
        && heads_bnhp.numel() > 0
        && stride[3] == 1
        && (0..3).all(leads_to_16_bytes)
        && (heads_bnhp.data_ptr() as usize).is_multiple_of(16)
}

fn dense(heads_bnhp: &Tensor) -> Result<Tensor> {
    let mut copy = Tensor::f_empty(heads_bnhp.size(), (heads_bnhp.kind(), heads_bnhp.device()))?;
    copy.f_copy_(heads_bnhp)?;
    Ok(copy)
}
