//! [`linear_cross_entropy`](crate::linear_cross_entropy) on CUDA: matrix products by libtorch, what is between them by
//! one kernel a chunk.
// t n_tokens, r rows of a chunk, d d_model, v vocab_size

use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Kind, Tensor};

use flowhn_torch::kernel::{Arg, Kernel, KernelSource, kind_define};
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, op};

use crate::kernels::{CROSS_ENTROPY, SCALED_CAST};

/// The most that the logits of a chunk take: enough rows for the matrix products to run at full speed and for few
/// passes over the gradient of the weight, which each chunk adds to.
const CHUNK_BYTES: i64 = 512 << 20;

/// Rows of a chunk are a multiple of this, the height of a tile of the matrix products.
const TILE_ROWS: i64 = 128;

pub(crate) struct LinearCrossEntropyCuda {
    ignore_index: i64,
    weight_kind: Kind,
    /// Whether a backward has handed out the gradients.
    is_spent: AtomicBool,
}

impl LinearCrossEntropyCuda {
    pub(crate) fn new(ignore_index: i64, weight_kind: Kind) -> Self {
        Self { ignore_index, weight_kind, is_spent: AtomicBool::new(false) }
    }
}

impl Function for LinearCrossEntropyCuda {
    const NAME: &'static str = "linear_cross_entropy";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let head = Head::new(Self::NAME, inputs[0], inputs[1], inputs[2], self.ignore_index)?;
        let mut gradients = Gradients {
            scale: head.scale()?,
            dx: ctx.needs_grad(0).then(|| head.x.f_empty_like()).transpose()?,
            dweight: ctx.needs_grad(1).then(|| WeightGrad::new(&head.weight)).transpose()?,
        };
        let wants_any = gradients.dx.is_some() || gradients.dweight.is_some();
        let losses = head.losses(wants_any.then_some(&mut gradients))?;
        let loss = head.mean(&losses, &gradients.scale)?;
        if ctx.is_recorded() {
            // A gradient that nobody wants is saved as an empty tensor, so that the positions stay fixed.
            let dweight = gradients.dweight.map(WeightGrad::finish).transpose()?;
            for grad in [gradients.dx, dweight] {
                ctx.save(&grad.map_or_else(|| Tensor::f_empty([0], (Kind::Float, loss.device())), Ok)?);
            }
        }
        Ok(vec![loss])
    }

    /// Multiplies by the gradient that comes in, which stays on the device: in place, or while rounding the gradient of
    /// a bf16 weight.
    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        if self.is_spent.swap(true, Ordering::Relaxed) {
            let message = "a second backward of one loss: the first handed out its gradients; run the forward again";
            return Err(Error::invalid(Self::NAME, message));
        }
        let [dx, dweight] = ctx.saved() else { unreachable!("two tensors are saved") };
        let factor = grads[0].f_contiguous()?;
        let scaled = |input_idx: usize, grad: &Tensor, kind: Kind| {
            ctx.needs_grad(input_idx).then(|| scaled(grad, &factor, kind)).transpose()
        };
        Ok(vec![scaled(0, dx, dx.kind())?, scaled(1, dweight, self.weight_kind)?, None])
    }
}

/// Loss of each token, `[t]`.
pub(crate) fn token_losses(x: &Tensor, weight: &Tensor, targets: &Tensor, ignore_index: i64) -> Result<Tensor> {
    Head::new("token_losses", x, weight, targets, ignore_index)?.losses(None)
}

/// The arguments as the kernels take them.
struct Head {
    op: &'static str,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: i64,
    n_tokens: i64,
    vocab_size: i64,
}

/// The gradients, filled chunk by chunk; `scale` is one over the number of targets that count.
struct Gradients {
    scale: Tensor,
    dx: Option<Tensor>,
    dweight: Option<WeightGrad>,
}

impl Head {
    fn new(op: &'static str, x: &Tensor, weight: &Tensor, targets: &Tensor, ignore_index: i64) -> Result<Self> {
        kind_define(op, "x_td", x)?;
        let (n_tokens, vocab_size) = (x.size()[0], weight.size()[0]);
        if i32::try_from(n_tokens.max(vocab_size)).is_err() {
            let message =
                format!("{n_tokens} tokens and {vocab_size} rows of the weight: the CUDA kernel counts to 2^31 - 1");
            return Err(Error::invalid(op, message));
        }
        let (x, weight) = (x.f_contiguous()?, weight.f_to_kind(x.kind())?.f_contiguous()?);
        let targets = targets.f_contiguous()?;
        Ok(Self { op, x, weight, targets, ignore_index, n_tokens, vocab_size })
    }

    fn scale(&self) -> Result<Tensor> {
        let scale = self.floats(&[])?;
        let args = [
            Arg::Tensor(&self.targets),
            Arg::I64(self.ignore_index),
            Arg::Tensor(&scale),
            Arg::I32(self.n_tokens as i32),
        ];
        let defines = self.variant(false)?.defines();
        kernel(&CROSS_ENTROPY, "cross_entropy_scale", &defines).launch([1, 1, 1], 1024, 0, &args)?;
        Ok(scale)
    }

    fn mean(&self, losses: &Tensor, scale: &Tensor) -> Result<Tensor> {
        let loss = self.floats(&[])?;
        let args = [Arg::Tensor(losses), Arg::Tensor(scale), Arg::Tensor(&loss), Arg::I32(self.n_tokens as i32)];
        let defines = self.variant(false)?.defines();
        kernel(&CROSS_ENTROPY, "cross_entropy_mean", &defines).launch([1, 1, 1], 1024, 0, &args)?;
        Ok(loss)
    }

    /// The loss of each token; fills the gradients on the way.
    fn losses(&self, mut gradients: Option<&mut Gradients>) -> Result<Tensor> {
        let losses = self.floats(&[self.n_tokens])?;
        // Rows begin at 16 bytes, whatever the vocabulary.
        let row_stride = (self.vocab_size + 7) / 8 * 8;
        let n_rows = chunk_rows(self.n_tokens, row_stride * self.x.kind().elt_size_in_bytes() as i64);
        let buffer = Tensor::f_empty([n_rows, row_stride], (self.x.kind(), self.x.device()))?;
        let weight_t = self.weight.f_tr()?;
        for start in (0..self.n_tokens).step_by(n_rows as usize) {
            let n_rows = n_rows.min(self.n_tokens - start);
            let chunk = |tensor: &Tensor| tensor.f_narrow(0, start, n_rows);
            let (x, targets, losses) = (chunk(&self.x)?, chunk(&self.targets)?, chunk(&losses)?);
            let logits = buffer.f_narrow(0, 0, n_rows)?.f_narrow(1, 0, self.vocab_size)?;
            let _ = x.f_mm_out(&logits, &weight_t)?;
            self.rows(&logits, &targets, &losses, gradients.as_ref().map(|gradients| &gradients.scale))?;
            let Some(Gradients { dx, dweight, .. }) = gradients.as_deref_mut() else { continue };
            if let Some(dx) = dx {
                let _ = logits.f_mm_out(&chunk(dx)?, &self.weight)?;
            }
            if let Some(dweight) = dweight {
                dweight.add_product(&logits, &x)?;
            }
        }
        Ok(losses)
    }

    /// The losses of a chunk; with a scale, its logits become their gradients.
    fn rows(&self, logits: &Tensor, targets: &Tensor, losses: &Tensor, scale: Option<&Tensor>) -> Result<()> {
        let variant = self.variant(scale.is_some())?;
        kernel(&CROSS_ENTROPY, "cross_entropy_rows", &variant.defines()).launch(
            [logits.size()[0] as u32, 1, 1],
            variant.n_threads as u32,
            0,
            &[
                Arg::Tensor(logits),
                Arg::I64(logits.stride()[0]),
                Arg::Tensor(targets),
                Arg::I64(self.ignore_index),
                Arg::opt(scale),
                Arg::Tensor(losses),
                Arg::I32(self.vocab_size as i32),
            ],
        )
    }

    fn variant(&self, with_gradient: bool) -> Result<RowVariant> {
        Ok(RowVariant::new(kind_define(self.op, "x_td", &self.x)?, self.vocab_size, with_gradient))
    }

    fn floats(&self, shape: &[i64]) -> Result<Tensor> {
        Ok(Tensor::f_empty(shape, (Kind::Float, self.x.device()))?)
    }
}

/// Rows of a chunk: as many as fit, in chunks of nearly one size instead of a small rest at the end.
fn chunk_rows(n_tokens: i64, row_bytes: i64) -> i64 {
    let up = |n: i64, step: i64| (n + step - 1) / step;
    let most = (CHUNK_BYTES / row_bytes / TILE_ROWS * TILE_ROWS).max(TILE_ROWS);
    let n_chunks = up(n_tokens, most).max(1);
    (up(up(n_tokens, n_chunks), TILE_ROWS) * TILE_ROWS).min(n_tokens).max(1)
}

/// The gradient of the weight while chunks are added to it, in f32.
struct WeightGrad {
    sum: Tensor,
    is_empty: bool,
}

impl WeightGrad {
    fn new(weight: &Tensor) -> Result<Self> {
        Ok(Self { sum: Tensor::f_empty(weight.size(), (Kind::Float, weight.device()))?, is_empty: true })
    }

    /// Adds `dlogits^T x`, in f32 also where the factors are bf16.
    fn add_product(&mut self, dlogits: &Tensor, x: &Tensor) -> Result<()> {
        /// The number by which the dispatcher knows `Kind::Float`.
        const FLOAT: op::Arg<'static> = op::Arg::Int(6);
        let (dlogits_t, sum) = (dlogits.f_tr()?, &self.sum);
        let [factor_a, factor_b, out] = [&dlogits_t, x, sum].map(op::Arg::Tensor);
        match (self.is_empty, x.kind()) {
            (true, Kind::Float) => drop(dlogits_t.f_mm_out(sum, x)?),
            (true, _) => drop(op::call("aten::mm", "dtype_out", &[factor_a, factor_b, FLOAT, out])?),
            (false, Kind::Float) => drop(self.sum.f_addmm_(&dlogits_t, x)?),
            (false, _) => {
                let one = || op::Arg::Int(1);
                let args = [op::Arg::Tensor(sum), factor_a, factor_b, FLOAT, one(), one(), out];
                drop(op::call("aten::addmm", "dtype_out", &args)?);
            }
        }
        self.is_empty = false;
        Ok(())
    }

    fn finish(self) -> Result<Tensor> {
        Ok(if self.is_empty { self.sum.f_zeros_like()? } else { self.sum })
    }
}

/// `tensor * factor`, the factor a number on the device: the tensor itself, multiplied in place, or one of another
/// type.
fn scaled(tensor: &Tensor, factor: &Tensor, kind: Kind) -> Result<Tensor> {
    const OP: &str = LinearCrossEntropyCuda::NAME;
    let n_elements = tensor.numel() as i64;
    let grid = [((n_elements + 4095) / 4096) as u32, 1, 1];
    let in_kind = kind_define(OP, "gradient", tensor)?;
    if kind == tensor.kind() {
        let args = [Arg::Tensor(tensor), Arg::Tensor(factor), Arg::I64(n_elements)];
        let defines = [("IN_KIND", in_kind), ("OUT_KIND", in_kind)];
        kernel(&SCALED_CAST, "scale_in_place", &defines).launch(grid, 256, 0, &args)?;
        return Ok(tensor.shallow_clone());
    }
    let out = Tensor::f_empty(tensor.size(), (kind, tensor.device()))?;
    let args = [Arg::Tensor(tensor), Arg::Tensor(factor), Arg::Tensor(&out), Arg::I64(n_elements)];
    let defines = [("IN_KIND", in_kind), ("OUT_KIND", kind_define(OP, "gradient", &out)?)];
    kernel(&SCALED_CAST, "scaled_cast", &defines).launch(grid, 256, 0, &args)?;
    Ok(out)
}

/// The macros of `cross_entropy.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowVariant {
    x_kind: i64,
    n_threads: i64,
    /// 16-byte words of a row that a thread holds; 0 where the row is read as a stream.
    held: i64,
    with_gradient: bool,
}

impl RowVariant {
    /// The variant for rows of this many logits.
    pub(crate) const fn new(x_kind: i64, vocab_size: i64, with_gradient: bool) -> Self {
        let word = if x_kind == 1 { 8 } else { 4 };
        let n_words = (vocab_size + word - 1) / word;
        let mut variant = Self { x_kind, n_threads: 512, held: 0, with_gradient };
        if !with_gradient {
            return variant;
        }
        // The smallest block of which each thread holds at most 8 words.
        let mut n_threads = 128;
        while n_threads < 1024 && 8 * n_threads < n_words {
            n_threads *= 2;
        }
        if n_words <= 8 * n_threads {
            let mut held = 1;
            while held * n_threads < n_words {
                held *= 2;
            }
            (variant.n_threads, variant.held) = (n_threads, held);
        }
        variant
    }

    pub(crate) const fn defines(&self) -> [(&'static str, i64); 4] {
        [
            ("X_KIND", self.x_kind),
            ("N_THREADS", self.n_threads),
            ("HELD", self.held),
            ("GRAD", self.with_gradient as i64),
        ]
    }
}

fn kernel<'a>(source: &'static KernelSource, entry: &'static str, defines: &'a [(&'static str, i64)]) -> Kernel<'a> {
    Kernel { source, entry, defines }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_nearly_equal_and_fit() {
        for vocab_size in [8, 1000, 50_264, 65_536, 262_144] {
            for n_tokens in [1, 31, 1000, 4096, 16_384, 32_768, 100_000] {
                let (row_bytes, n_rows) = (2 * vocab_size, chunk_rows(n_tokens, 2 * vocab_size));
                assert!(n_rows >= 1 && n_rows <= n_tokens);
                assert!(n_rows * row_bytes <= CHUNK_BYTES, "{n_rows} rows of {row_bytes} bytes");
                let n_chunks = (n_tokens + n_rows - 1) / n_rows;
                assert!(n_chunks * n_rows - n_tokens < n_chunks * TILE_ROWS, "{n_tokens} tokens in rows of {n_rows}");
            }
        }
    }

    #[test]
    fn held_rows_fit_their_blocks() {
        for x_kind in [0, 1] {
            for vocab_size in [1, 7, 1000, 32_000, 32_769, 50_257, 65_536, 65_537, 200_000] {
                let variant = RowVariant::new(x_kind, vocab_size, true);
                let word = if x_kind == 1 { 8 } else { 4 };
                let holds = variant.held * variant.n_threads * word;
                assert!(variant.held == 0 || holds >= vocab_size, "{vocab_size}: {variant:?}");
                assert_eq!(variant.held == 0, vocab_size > 8192 * word, "{vocab_size}: {variant:?}");
            }
        }
    }
}
