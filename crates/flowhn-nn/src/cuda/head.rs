//! [`linear_cross_entropy`](crate::linear_cross_entropy) on CUDA, chunk by chunk, in one of two ways: `exponentials` on Hopper, where
//! the first product is ours and leaves nothing to do between the products; `logits` everywhere else.
// t n_tokens, r rows of a chunk, d d_model, v vocab_size

mod exponentials;
mod logits;

use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Kind, Tensor};

use flowhn_torch::kernel::{Arg, Kernel, KernelSource, kind_define};
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, Sum, product_into};

use super::product_sm90::{CLUSTER_ROWS, up_to};
use crate::kernels::{CROSS_ENTROPY, SCALED_CAST};
use crate::{LOGITS_BYTES, MAX_LOGITS_BYTES};

use exponentials::Exponentials;
pub(crate) use exponentials::{GRAD, LOSSES_ONLY, STORE, SUMS_ONLY};
use logits::Logits;
pub(crate) use logits::RowVariant;

pub(crate) struct LinearCrossEntropyCuda {
    ignore_index: i64,
    logits_bytes: u64,
    weight_kind: Kind,
    /// Whether a backward has handed out the gradients.
    is_spent: AtomicBool,
}

impl LinearCrossEntropyCuda {
    pub(crate) fn new(ignore_index: i64, logits_bytes: u64, weight_kind: Kind) -> Self {
        Self { ignore_index, logits_bytes, weight_kind, is_spent: AtomicBool::new(false) }
    }
}

/// The inputs are x, the leaf that the gradient of the weight goes to, the targets, and the weight in the type of x.
impl Function for LinearCrossEntropyCuda {
    const NAME: &'static str = "linear_cross_entropy";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let head = Head::new(Self::NAME, inputs[0], inputs[3], inputs[2], self.ignore_index, self.logits_bytes)?;
        let mut gradients = Gradients {
            scale: head.scale()?,
            dx: ctx.needs_grad(0).then(|| head.empty(&head.x.size(), head.x.kind())).transpose()?,
            dweight: ctx.needs_grad(1).then(|| WeightGrad::new(&head, self.weight_kind)),
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

    /// Multiplies by the gradient that comes in, which stays on the device: in place (another rounding where the gradient is bf16 already
    /// and the factor is not 1), or while rounding an f32 sum to the type of the leaf.
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
        Ok(vec![scaled(0, dx, dx.kind())?, scaled(1, dweight, self.weight_kind)?, None, None])
    }
}

/// Loss of each token, `[t]`.
pub(crate) fn token_losses(x: &Tensor, weight: &Tensor, targets: &Tensor, ignore_index: i64) -> Result<Tensor> {
    Head::new("token_losses", x, weight, targets, ignore_index, LOGITS_BYTES)?.losses(None)
}

/// The arguments as the kernels take them, dense.
struct Head {
    op: &'static str,
    x: Tensor,
    /// In the type of x.
    weight: Tensor,
    targets: Tensor,
    ignore_index: i64,
    /// The most that a chunk's logits, or the exponentials in their place, take.
    logits_bytes: i64,
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
    fn new(
        op: &'static str,
        x: &Tensor,
        weight: &Tensor,
        targets: &Tensor,
        ignore_index: i64,
        logits_bytes: u64,
    ) -> Result<Self> {
        kind_define(op, "x_td", x)?;
        let (n_tokens, vocab_size) = (x.size()[0], weight.size()[0]);
        if i32::try_from(n_tokens.max(vocab_size)).is_err() {
            let message =
                format!("{n_tokens} tokens and {vocab_size} rows of the weight: the CUDA kernel counts to 2^31 - 1");
            return Err(Error::invalid(op, message));
        }
        let [x, weight, targets] = [x.f_contiguous()?, weight.f_contiguous()?, targets.f_contiguous()?];
        let logits_bytes = logits_bytes.min(MAX_LOGITS_BYTES) as i64;
        Ok(Self { op, x, weight, targets, ignore_index, logits_bytes, n_tokens, vocab_size })
    }

    fn scale(&self) -> Result<Tensor> {
        let scale = self.floats(&[])?;
        let args = [
            Arg::Tensor(&self.targets),
            Arg::I64(self.ignore_index),
            Arg::Tensor(&scale),
            Arg::I32(self.n_tokens as i32),
        ];
        let defines = RowVariant::WITHOUT_ROWS.defines();
        kernel(&CROSS_ENTROPY, "cross_entropy_scale", &defines).launch([1, 1, 1], 1024, 0, &args)?;
        Ok(scale)
    }

    fn mean(&self, losses: &Tensor, scale: &Tensor) -> Result<Tensor> {
        let loss = self.floats(&[])?;
        let args = [Arg::Tensor(losses), Arg::Tensor(scale), Arg::Tensor(&loss), Arg::I32(self.n_tokens as i32)];
        let defines = RowVariant::WITHOUT_ROWS.defines();
        kernel(&CROSS_ENTROPY, "cross_entropy_mean", &defines).launch([1, 1, 1], 1024, 0, &args)?;
        Ok(loss)
    }

    /// The loss of each token; fills the gradients on the way.
    fn losses(&self, gradients: Option<&mut Gradients>) -> Result<Tensor> {
        match Exponentials::new(self)? {
            Some(exponentials) => exponentials.losses(gradients),
            None => Logits::new(self)?.losses(gradients),
        }
    }

    /// An unwritten tensor.
    fn empty(&self, shape: &[i64], kind: Kind) -> Result<Tensor> {
        Ok(Tensor::f_empty(shape, (kind, self.x.device()))?)
    }

    fn floats(&self, shape: &[i64]) -> Result<Tensor> {
        self.empty(shape, Kind::Float)
    }
}

/// Rows of a chunk: as many as fit into `n_bytes`, in chunks of nearly one size instead of a small rest at the end, each of whole tiles
/// of the matrix products.
fn chunk_rows(n_tokens: i64, row_bytes: i64, n_bytes: i64) -> i64 {
    let most = (n_bytes / row_bytes / CLUSTER_ROWS * CLUSTER_ROWS).max(CLUSTER_ROWS);
    let n_chunks = (up_to(n_tokens, most) / most).max(1);
    up_to((n_tokens + n_chunks - 1) / n_chunks, CLUSTER_ROWS).min(n_tokens).max(1)
}

/// Whether the logits of so many tokens in bf16 are one chunk.
pub(crate) fn is_one_chunk(n_tokens: i64, vocab_size: i64, logits_bytes: u64) -> bool {
    chunk_rows(n_tokens, 2 * up_to(vocab_size, 8), logits_bytes.min(MAX_LOGITS_BYTES) as i64) >= n_tokens
}

/// The gradient of the weight while chunks are added to it.
struct WeightGrad {
    /// What has the gradient's shape and device.
    weight: Tensor,
    /// Tokens of all chunks.
    n_tokens: i64,
    /// The type that the gradient has in the end.
    kind: Kind,
    sum: Option<Tensor>,
}

impl WeightGrad {
    fn new(head: &Head, kind: Kind) -> Self {
        Self { weight: head.weight.shallow_clone(), n_tokens: head.n_tokens, kind, sum: None }
    }

    /// Adds `dlogits^T x`: in f32 also where the factors are bf16, unless the chunk is all there is and leaves its product in the type of
    /// the gradient.
    fn add_product(&mut self, dlogits: &Tensor, x: &Tensor) -> Result<()> {
        let dlogits_t = dlogits.f_tr()?;
        if let Some(sum) = &self.sum {
            product_into(&dlogits_t, x, sum, Sum::Old)?;
            return Ok(());
        }
        let kind = if x.size()[0] == self.n_tokens { self.kind } else { Kind::Float };
        let sum = Tensor::f_empty(self.weight.size(), (kind, self.weight.device()))?;
        product_into(&dlogits_t, x, &sum, Sum::New)?;
        self.sum = Some(sum);
        Ok(())
    }

    fn finish(self) -> Result<Tensor> {
        let zeros = || Tensor::f_zeros(self.weight.size(), (self.kind, self.weight.device()));
        Ok(self.sum.map_or_else(zeros, Ok)?)
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

fn kernel<'a>(source: &'static KernelSource, entry: &'static str, defines: &'a [(&'static str, i64)]) -> Kernel<'a> {
    Kernel { source, entry, defines }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_nearly_equal_and_fit() {
        let limits = [LOGITS_BYTES, MAX_LOGITS_BYTES].map(|n_bytes| n_bytes as i64);
        let vocab_sizes = [8, 1000, 50_264, 65_536, 262_144];
        for (n_bytes, vocab_size) in limits.into_iter().flat_map(|n_bytes| vocab_sizes.map(|size| (n_bytes, size))) {
            for n_tokens in [1, 31, 1000, 4096, 16_384, 32_768, 100_000] {
                let (row_bytes, n_rows) = (2 * vocab_size, chunk_rows(n_tokens, 2 * vocab_size, n_bytes));
                assert!(n_rows >= 1 && n_rows <= n_tokens);
                assert!(n_rows * row_bytes <= n_bytes, "{n_rows} rows of {row_bytes} bytes");
                let n_chunks = (n_tokens + n_rows - 1) / n_rows;
                assert!(
                    n_chunks * n_rows - n_tokens < n_chunks * CLUSTER_ROWS,
                    "{n_tokens} tokens in rows of {n_rows}"
                );
            }
        }
        assert_eq!(chunk_rows(16_384, 2 * 65_536, 2 << 30), 16_384, "one chunk where all fit");
        assert!(is_one_chunk(16_384, 65_536, 2 << 30) && is_one_chunk(256, 65_536, 1) && !is_one_chunk(257, 65_536, 1));
        // They would fit, but chunks are of whole tiles.
        assert!(!is_one_chunk(1600, 320, 1 << 20));
    }
}
