//! A step of decoding on CUDA: one token a sequence, by kernels that take its position and the length of the cache from the device, so
//! that one CUDA graph serves every length.

// b batch, h query heads, k key heads, p d_head

use tch::{Kind, Tensor};

use flowhn_torch::kernel::rows::{aligned, rows_are_aligned, with_dense_rows};
use flowhn_torch::kernel::{Arg, Kernel, kind_define};
use flowhn_torch::{Error, Result, check};

use crate::cache::StepRoom;
use crate::kernels::{DECODE_APPEND, DECODE_ATTENTION};
use crate::{Clock, KvCache};

const OP: &str = "decode_attention";
/// Features that a lane reads at once.
const VEC: i64 = 8;
/// The widest head.
const MAX_HEAD: i64 = 1024;
/// Vectors of queries that a thread holds.
const MAX_VECTORS: i64 = 8;
/// Warps of a block.
const WARPS: i64 = 8;
/// Keys that a lane has on their way, where each is one word of 16 bytes.
const AHEAD: i64 = 8;
/// Blocks to cut a batch into: two on each multiprocessor of an H100.
const N_BLOCKS: i64 = 264;
/// Most parts of a sequence; the kernel has room for so many.
const MAX_PARTS: i64 = 64;

/// Puts a token's key and value into the cache and returns its queries; queries and keys turn where the clock has angles.
///
/// # Shapes
/// - `q_b1hp`: `[batch, 1, n_heads, d_head]`, or none where the token only serves later ones
/// - `k_b1kp`, `v_b1kp`: `[batch, 1, n_kv_heads, d_head]`, of the cache's sizes and dtype
pub(crate) fn append(
    q_b1hp: Option<&Tensor>,
    k_b1kp: &Tensor,
    v_b1kp: &Tensor,
    clock: &Clock,
    cache: &mut KvCache,
) -> Result<Option<Tensor>> {
    let StepRoom { keys, values, counted } = cache.step_room()?;
    let [batch, capacity, n_kv_heads, d_head] =
        check::dims(OP, "cache", keys, "[batch, capacity, n_kv_heads, d_head]")?;
    if cache.len() as i64 == capacity {
        return Err(Error::invalid(OP, format!("the cache is full with {capacity} tokens: make room before a step")));
    }
    for (arg, x) in [("k_b1kp", k_b1kp), ("v_b1kp", v_b1kp)] {
        check::shape(OP, arg, x, &[batch, 1, n_kv_heads, d_head])?;
        check::kind(OP, arg, x, &[keys.kind()])?;
    }
    let position = clock.on_device().ok_or_else(|| Error::invalid(OP, "the clock does not count on this device"))?;
    let (q, k, v) = (q_b1hp.map(with_dense_rows).transpose()?, with_dense_rows(k_b1kp)?, with_dense_rows(v_b1kp)?);
    let angles = clock.angles().map(|table| table.parts());
    let turned = match (&q, angles) {
        (Some(q), Some(_)) => Some(Tensor::f_empty(q.size(), (q.kind(), q.device()))?),
        _ => None,
    };
    let width = if angles.is_some() { d_head / 2 } else { d_head };
    let rows: Vec<&Tensor> = [&k, &v, keys, values].into_iter().chain(&q).chain(&turned).collect();
    let defines = [("X_KIND", kind_define(OP, "k_b1kp", &k)?), ("ROTARY", i64::from(angles.is_some()))];
    let args = [
        &q.as_ref().map_or([Arg::Null, Arg::I64(0), Arg::I64(0)], strided)[..],
        &strided(&k),
        &strided(&v),
        &[Arg::opt(angles.map(|(cos, _)| cos)), Arg::opt(angles.map(|(_, sin)| sin)), Arg::opt(turned.as_ref())],
        &[Arg::Tensor(keys), Arg::Tensor(values), Arg::Tensor(&counted.positions)],
        &[Arg::Tensor(position), Arg::Tensor(&counted.count), Arg::I32(capacity as i32)],
        &[Arg::I32(q.as_ref().map_or(0, |q| q.size()[2]) as i32), Arg::I32(n_kv_heads as i32)],
        &[Arg::I32(d_head as i32), aligned(width, &rows)],
    ];
    let kernel = Kernel { source: &DECODE_APPEND, entry: "decode_append", defines: &defines };
    kernel.launch([batch as u32, 1, 1], 256, 0, &args.concat())?;
    cache.count_step(clock.positions().host()[0])?;
    Ok(turned.or(q))
}

/// Attention of a token's queries to what is cached, the token included: `[batch, 1, n_heads, d_head]` as `q_b1hp`, which [`append`]
/// returned. With a window a query sees the keys less than `window` positions before it and those below `n_sinks`.
pub(crate) fn attend(q_b1hp: &Tensor, cache: &KvCache, window: Option<usize>, n_sinks: usize) -> Result<Tensor> {
    let StepRoom { keys, values, counted } = cache.step_room()?;
    let [batch, capacity, n_kv_heads, d_head] =
        check::dims(OP, "cache", keys, "[batch, capacity, n_kv_heads, d_head]")?;
    let n_heads = q_b1hp.size()[2];
    let form = Form::new(batch, n_heads, n_kv_heads, d_head, q_b1hp.kind())?;
    let o = Tensor::f_empty([batch, 1, n_heads, d_head], (q_b1hp.kind(), q_b1hp.device()))?;
    let part = |width: i64| Tensor::f_empty([batch, n_heads, form.n_parts, width], (Kind::Float, q_b1hp.device()));
    let (sums, softmax) = match form.n_parts {
        1 => (None, None),
        _ => (Some(part(d_head)?), Some(part(2)?)),
    };
    let (sums_arg, softmax_arg) = (Arg::opt(sums.as_ref()), Arg::opt(softmax.as_ref()));
    // A window past any position is no window.
    let window = window.and_then(|window| i64::try_from(window).ok()).filter(|&window| window < i64::MAX / 2);
    let seen = [Arg::I32(form.n_parts as i32), Arg::I64(window.unwrap_or(0)), Arg::I64(n_sinks as i64)];
    let is_aligned = rows_are_aligned(d_head, &[q_b1hp, keys, values]);
    let defines = form.defines(kind_define(OP, "q_b1hp", q_b1hp)?, is_aligned);
    let args = [
        &strided(q_b1hp)[..],
        &[Arg::Tensor(keys), Arg::Tensor(values), Arg::Tensor(&counted.positions), Arg::Tensor(&counted.count)],
        &[Arg::Tensor(&o), sums_arg, softmax_arg, Arg::I32(capacity as i32)],
        &[Arg::I32(n_heads as i32), Arg::I32(n_kv_heads as i32), Arg::I32(d_head as i32)],
        &seen,
        &[Arg::F32((d_head as f64).sqrt().recip() as f32)],
    ];
    let grid = [form.n_parts, n_kv_heads * form.n_tiles, batch].map(|n| n as u32);
    let kernel = |entry| Kernel { source: &DECODE_ATTENTION, entry, defines: &defines };
    let block = (32 * WARPS) as u32;
    kernel("decode_attention").launch(grid, block, form.shared_bytes(is_aligned), &args.concat())?;
    if form.n_parts > 1 {
        let args = [
            &[sums_arg, softmax_arg, Arg::Tensor(&counted.positions), Arg::Tensor(&counted.count), Arg::Tensor(&o)][..],
            &[Arg::I32(d_head as i32)],
            &seen,
        ];
        kernel("decode_attention_join").launch([(batch * n_heads) as u32, 1, 1], 256, 0, &args.concat())?;
    }
    Ok(o)
}

/// A token's rows, `[batch, 1, heads, d_head]`: address, elements between sequences and between heads.
fn strided(x: &Tensor) -> [Arg<'_>; 3] {
    let stride = x.stride();
    [Arg::Tensor(x), Arg::I64(stride[0]), Arg::I64(stride[2])]
}

/// How blocks and threads share the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Form {
    lanes: i64,
    vectors: i64,
    /// Query heads of a block.
    group: i64,
    /// Blocks that share a key head.
    n_tiles: i64,
    /// Keys that a lane takes at once.
    turn: i64,
    /// Turns on their way, that at hand included.
    stages: i64,
    /// Words of 16 bytes that eight features take.
    words: i64,
    n_parts: i64,
}

impl Form {
    fn new(batch: i64, n_heads: i64, n_kv_heads: i64, d_head: i64, kind: Kind) -> Result<Self> {
        if d_head > MAX_HEAD {
            let message = format!("d_head is {d_head}, decoding on a CUDA device takes at most {MAX_HEAD}");
            return Err(Error::invalid(OP, message));
        }
        let n_vectors = (d_head + VEC - 1) / VEC;
        let lanes = n_vectors.clamp(1, 32) as u64;
        let lanes = lanes.next_power_of_two() as i64;
        let vectors = ((n_vectors + lanes - 1) / lanes) as u64;
        let vectors = vectors.next_power_of_two() as i64;
        let ratio = n_heads / n_kv_heads;
        let group = ratio.min(MAX_VECTORS / vectors);
        let n_tiles = (ratio + group - 1) / group;
        let n_rows = batch * n_kv_heads * n_tiles;
        let words = if kind == Kind::BFloat16 { 1 } else { 2 };
        let keys = (AHEAD / (vectors * words)).max(2);
        let turn = if keys >= 4 { 2 } else { 1 };
        let n_parts = ((N_BLOCKS + n_rows - 1) / n_rows).min(MAX_PARTS);
        Ok(Self { lanes, vectors, group, n_tiles, turn, stages: keys / turn, words, n_parts })
    }

    /// The larger of `Ring` and `Joined` in the kernel.
    fn shared_bytes(&self, is_aligned: bool) -> usize {
        let ring = 2 * 16 * 32 * WARPS * self.stages * self.turn * self.vectors * self.words;
        let joined = 4 * WARPS * self.group * (self.lanes * self.vectors * VEC + 2);
        (if is_aligned { ring.max(joined) } else { joined }) as usize
    }

    fn defines(&self, kind: i64, aligned: bool) -> [(&'static str, i64); 7] {
        [
            ("X_KIND", kind),
            ("LANES", self.lanes),
            ("VECTORS", self.vectors),
            ("GROUP", self.group),
            ("TURN", self.turn),
            ("STAGES", self.stages),
            ("ROWS_ALIGNED", i64::from(aligned)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_cover_every_head() {
        for d_head in [1, 6, 8, 20, 64, 80, 128, 256, 257, 300, 600, MAX_HEAD] {
            for ratio in [1, 2, 3, 4, 5, 8, 11, 32] {
                for batch in [1, 8, 64, 1000] {
                    let form = Form::new(batch, 3 * ratio, 3, d_head, Kind::BFloat16).unwrap();
                    let Form { lanes, vectors, group, n_tiles, n_parts, .. } = form;
                    assert!(lanes * vectors * VEC >= d_head && 32 % lanes == 0, "{d_head}: {form:?}");
                    assert!(group * vectors <= MAX_VECTORS && group * n_tiles >= ratio, "{ratio}: {form:?}");
                    assert!((1..=MAX_PARTS).contains(&n_parts), "{batch}: {form:?}");
                    assert!(form.shared_bytes(true) <= 96 << 10, "{d_head}: {form:?}");
                    assert!(form.stages >= 2, "{form:?}");
                }
            }
        }
        let parts = |batch: i64, ratio: i64| Form::new(batch, 3 * ratio, 3, 64, Kind::BFloat16).unwrap().n_parts;
        assert_eq!([parts(1, 4), parts(8, 4), parts(64, 4), parts(1000, 1)], [64, 11, 2, 1]);
        let message = Form::new(1, 1, 1, MAX_HEAD + 1, Kind::Float).unwrap_err().to_string();
        assert!(message.contains("at most 1024"), "{message}");
    }
}
