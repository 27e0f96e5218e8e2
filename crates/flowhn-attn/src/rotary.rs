//! Rotary position embedding: each pair of features turns by an angle that grows with the token's position.
//!
//! Feature `i` of the first half and feature `i` of the second half are a pair (the convention of GPT-NeoX and Llama), turned
//! by `position * theta^(-2 i / d_head)`, or what [`crate::RopeScaling`] makes of it. Angles are computed on the host in double precision, so that far positions keep
//! their exactness and every device uses the same table.

// b batch, n tokens, h heads, p d_head

use half::bf16;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use flowhn_torch::cpu::{self, Element};
use flowhn_torch::kernel::rows::{aligned, with_dense_rows};
use flowhn_torch::kernel::{Arg, Kernel, kind_define};
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, apply, check};

use crate::Rope;
use crate::kernels::ROTARY;

/// Elements that one task of the CPU path turns.
const TASK_LEN: usize = 1 << 14;

/// Cosines and sines of the angles of given positions: two tensors `[n, d_head / 2]`, f32.
#[derive(Debug)]
pub struct RotaryTable {
    cos: Tensor,
    sin: Tensor,
    d_head: i64,
    rope: Rope,
}

impl RotaryTable {
    /// The table of `positions`, for heads of `d_head` features, on `device`.
    ///
    /// # Errors
    /// [`Error::Invalid`] unless `d_head` is even and positive, and the numbers of `rope`, a base where nothing scales, are positive and finite.
    pub fn new(positions: &[i64], d_head: i64, rope: impl Into<Rope>, device: Device) -> Result<Self> {
        let rope = rope.into();
        if d_head <= 0 || d_head % 2 != 0 {
            return Err(Error::invalid(
                "rotary",
                format!("d_head is {d_head}, but features turn in pairs: it must be even"),
            ));
        }
        if let Some(problem) = rope.problem() {
            return Err(Error::invalid("rotary", problem));
        }
        let rates = rope.rates(d_head);
        let angles = positions.iter().flat_map(|&position| rates.iter().map(move |rate| position as f64 * rate));
        let (sin, cos): (Vec<f32>, Vec<f32>) =
            angles.map(f64::sin_cos).map(|(sin, cos)| (sin as f32, cos as f32)).unzip();
        let table = |values: &[f32]| -> Result<Tensor> {
            Ok(cpu::from_slice(&[positions.len() as i64, d_head / 2], values)?.f_to_device(device)?)
        };
        Ok(Self { cos: table(&cos)?, sin: table(&sin)?, d_head, rope })
    }

    /// The cosines and the sines.
    pub(crate) fn parts(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// Features of a head.
    pub fn d_head(&self) -> i64 {
        self.d_head
    }

    /// How fast pairs turn.
    pub fn rope(&self) -> Rope {
        self.rope
    }

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.cos.size()[0] as usize
    }

    /// Whether there are no positions.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Clone for RotaryTable {
    /// Another handle of the same tensors.
    fn clone(&self) -> Self {
        Self { cos: self.cos.shallow_clone(), sin: self.sin.shallow_clone(), ..*self }
    }
}

/// Turns every head of every token by the angles of its position.
///
/// # Shapes
/// - `x_bnhp`: `[batch, n, heads, d_head]`, f32, f64 (on the CPU only) or bf16, any strides; bf16 is turned in f32
/// - `table`: `n` positions, `d_head` features
/// - returns the shape and dtype of `x_bnhp`, contiguous
///
/// ```
/// use flowhn_attn::{RotaryTable, rotary};
/// use tch::{Device, Tensor};
/// let x = Tensor::from_slice(&[1f32, 0.]).view([1, 1, 1, 2]);
/// let turned = rotary(&x, &RotaryTable::new(&[2], 2, 10000., Device::Cpu)?)?;
/// assert_eq!(Vec::<f32>::try_from(turned.view(-1)).unwrap(), [2f32.cos(), 2f32.sin()]);
/// # Ok::<(), flowhn_attn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`] or [`Error::Device`].
pub fn rotary(x_bnhp: &Tensor, table: &RotaryTable) -> Result<Tensor> {
    let [batch, _, heads, _] = check::dims("rotary", "x_bnhp", x_bnhp, "[batch, n, heads, d_head]")?;
    check::shape("rotary", "x_bnhp", x_bnhp, &[batch, table.len() as i64, heads, table.d_head])?;
    check::kind("rotary", "x_bnhp", x_bnhp, &[Kind::Float, Kind::Double, Kind::BFloat16])?;
    check::device("rotary", "x_bnhp", x_bnhp, table.cos.device())?;
    let turned = apply(Rotary { table: table.clone() }, &[x_bnhp])?;
    turned.into_iter().next().ok_or_else(|| Error::invalid("rotary", "the function lost its output"))
}

struct Rotary {
    table: RotaryTable,
}

impl Function for Rotary {
    const NAME: &'static str = "rotary";

    fn forward(&mut self, _ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let x = inputs[0];
        let room = || Ok(Tensor::f_empty(x.size(), (x.kind(), x.device()))?);
        Ok(vec![turn(x, &self.table, Sense::Forth, room)?])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let dy = &grads[0];
        Ok(vec![Some(turn(dy, &self.table, Sense::Back, || ctx.grad_place(0, dy))?)])
    }
}

/// Which way to turn. A rotation's transpose, which the gradient needs, is the rotation back.
#[derive(Clone, Copy, PartialEq)]
enum Sense {
    Forth,
    Back,
}

/// On CUDA the result is written to what `room` gives; elsewhere nobody asks for it.
fn turn(x: &Tensor, table: &RotaryTable, sense: Sense, room: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
    match (x.device(), x.kind()) {
        _ if x.numel() == 0 => Ok(x.f_zeros_like()?),
        (Device::Cpu, Kind::Float) => turn_on_cpu::<f32>(x, table, sense),
        (Device::Cpu, Kind::Double) => turn_on_cpu::<f64>(x, table, sense),
        (Device::Cpu, Kind::BFloat16) => turn_on_cpu::<bf16>(x, table, sense),
        (Device::Cuda(_), _) => turn_on_cuda(x, table, sense, room()?),
        _ => turn_by_ops(x, table, sense),
    }
}

/// One kernel, in which a thread turns eight pairs, into `y`, whose heads are dense.
fn turn_on_cuda(x: &Tensor, table: &RotaryTable, sense: Sense, y: Tensor) -> Result<Tensor> {
    const BLOCK: i64 = 256;
    let x = with_dense_rows(x)?;
    let (batch, n, heads, d_head) = x.size4()?;
    let half = d_head / 2;
    let n_tokens = i32::try_from(batch * n).map_err(|_| {
        Error::invalid("rotary", format!("{} tokens are more than a launch counts; split the batch", batch * n))
    })?;
    let tokens_per_block = (BLOCK / (heads * ((half + 7) / 8))).clamp(1, BLOCK) as i32;
    let (strides, y_strides) = (x.stride(), y.stride());
    let defines = [("X_KIND", kind_define("rotary", "x_bnhp", &x)?)];
    Kernel { source: &ROTARY, entry: "rotary", defines: &defines }.launch(
        [(n_tokens as u32).div_ceil(tokens_per_block as u32), 1, 1],
        BLOCK as u32,
        0,
        &[
            Arg::Tensor(&x),
            Arg::Tensor(&table.cos),
            Arg::Tensor(&table.sin),
            Arg::Tensor(&y),
            Arg::I64(strides[0]),
            Arg::I64(strides[1]),
            Arg::I64(strides[2]),
            Arg::I64(y_strides[0]),
            Arg::I64(y_strides[1]),
            Arg::I64(y_strides[2]),
            Arg::I32(batch as i32),
            Arg::I32(n as i32),
            Arg::I32(heads as i32),
            Arg::I32(half as i32),
            Arg::I32(tokens_per_block),
            aligned(half, &[&x, &y, &table.cos, &table.sin]),
            Arg::F32(if sense == Sense::Forth { 1. } else { -1. }),
        ],
    )?;
    Ok(y)
}

/// One pass over the elements, tokens shared out to threads.
fn turn_on_cpu<T: Pair>(x: &Tensor, table: &RotaryTable, sense: Sense) -> Result<Tensor> {
    let x = if x.stride()[3] == 1 { x.shallow_clone() } else { x.f_contiguous()? };
    let input = cpu::strided::<T>(&x)?;
    let (cos, sin) = (cpu::slice::<f32>(&table.cos)?, cpu::slice::<f32>(&table.sin)?);
    let (n, heads, d_head) = (input.shape[1], input.shape[2], input.shape[3]);
    let (half, token_len) = (d_head / 2, heads * d_head);
    let tokens_per_task = (TASK_LEN / token_len).max(1);
    let turn_token = |token_idx: usize, out: &mut [T]| {
        let (b, i) = (token_idx / n, token_idx % n);
        let angles = i * half..(i + 1) * half;
        let (cos, sin) = (&cos[angles.clone()], &sin[angles]);
        for (head, out) in out.chunks_exact_mut(d_head).enumerate() {
            let start = b * input.strides[0] + i * input.strides[1] + head * input.strides[2];
            let (first, second) = input.data[start..start + d_head].split_at(half);
            let (out_first, out_second) = out.split_at_mut(half);
            let angles = cos.iter().zip(sin);
            let turned = out_first.iter_mut().zip(out_second);
            for (((&first, &second), (&cos, &sin)), turned) in first.iter().zip(second).zip(angles).zip(turned) {
                let sin = if sense == Sense::Forth { sin } else { -sin };
                (*turned.0, *turned.1) = T::turn(first, second, cos, sin);
            }
        }
    };
    Ok(cpu::build(&x.size(), |out: &mut [T]| {
        out.par_chunks_mut(tokens_per_task * token_len).enumerate().for_each(|(task_idx, tokens)| {
            for (k, out) in tokens.chunks_exact_mut(token_len).enumerate() {
                turn_token(task_idx * tokens_per_task + k, out);
            }
        });
    }))
}

/// Elements whose pairs turn.
trait Pair: Element {
    /// The pair `(first, second)` turned by the angle with this cosine and sine.
    fn turn(first: Self, second: Self, cos: f32, sin: f32) -> (Self, Self);
}

impl Pair for f32 {
    fn turn(first: f32, second: f32, cos: f32, sin: f32) -> (f32, f32) {
        (first * cos - second * sin, second * cos + first * sin)
    }
}

impl Pair for f64 {
    fn turn(first: f64, second: f64, cos: f32, sin: f32) -> (f64, f64) {
        let (cos, sin) = (f64::from(cos), f64::from(sin));
        (first * cos - second * sin, second * cos + first * sin)
    }
}

impl Pair for bf16 {
    fn turn(first: bf16, second: bf16, cos: f32, sin: f32) -> (bf16, bf16) {
        let (first, second) = f32::turn(first.to_f32(), second.to_f32(), cos, sin);
        (bf16::from_f32(first), bf16::from_f32(second))
    }
}

/// The same by libtorch's operators, for other devices.
fn turn_by_ops(x: &Tensor, table: &RotaryTable, sense: Sense) -> Result<Tensor> {
    let compute = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let axis = |t: &Tensor| -> Result<Tensor> { Ok(t.f_unsqueeze(1)?.f_to_kind(compute)?) };
    let (cos, sin) = (axis(&table.cos)?, axis(&table.sin)?);
    let sin = if sense == Sense::Forth { sin } else { sin.f_neg()? };
    let halves = x.f_to_kind(compute)?.f_chunk(2, -1)?;
    let [first, second] = halves.as_slice() else {
        return Err(Error::invalid("rotary", "a head of features did not split in two halves"));
    };
    let turned_first = first.f_mul(&cos)?.f_sub(&second.f_mul(&sin)?)?;
    let turned_second = second.f_mul(&cos)?.f_add(&first.f_mul(&sin)?)?;
    Ok(Tensor::f_cat(&[turned_first, turned_second], -1)?.f_to_kind(x.kind())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flowhn_torch::testing::assert_close;

    #[test]
    fn both_paths_agree() {
        tch::manual_seed(0);
        let table = RotaryTable::new(&[0, 3, 1000, 100_000], 6, 10000., Device::Cpu).unwrap();
        for (kind, tol) in [(Kind::Float, 1e-6), (Kind::Double, 1e-12), (Kind::BFloat16, 1e-2)] {
            let x = Tensor::randn([3, 5, 4, 6], (Kind::Float, Device::Cpu)).to_kind(kind).transpose(1, 2);
            for sense in [Sense::Forth, Sense::Back] {
                let (cpu, ops) = (
                    turn(&x, &table, sense, || unreachable!("not CUDA")).unwrap(),
                    turn_by_ops(&x, &table, sense).unwrap(),
                );
                assert_eq!(cpu.kind(), kind);
                assert_close("turned", &cpu, &ops, tol);
            }
        }
    }
}
