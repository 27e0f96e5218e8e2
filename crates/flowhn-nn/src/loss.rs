//! The LM head and its cross-entropy in one operation, so that the logits of a whole batch are never in memory at once.

mod head;

use tch::{Device, Kind, Tensor};

use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, apply, check};

use crate::cuda;
use crate::cuda::head::LinearCrossEntropyCuda;
use crate::embedding::check_ids;
use crate::rows::{for_float_kind, no_kernel};
use crate::{Weight, linear};

/// The matrix of an LM head, `[vocab_size, d_model]`: made from a tensor or from a [`Weight`].
///
/// A tensor is in the type of the activations, or f32 beside bf16, and is then rounded for each call. A weight may be in any type: on
/// CUDA its bf16 copy, if it keeps one, meets bf16 activations. The gradient goes to the tensor or, beside bf16 activations, to
/// [`Weight::grad_leaf`], else to the weight's master, in the type of that.
#[derive(Clone, Copy, Debug)]
pub struct HeadMatrix<'a>(Source<'a>);

#[derive(Clone, Copy, Debug)]
enum Source<'a> {
    Tensor(&'a Tensor),
    Weight(&'a Weight),
}

impl<'a> From<&'a Tensor> for HeadMatrix<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self(Source::Tensor(tensor))
    }
}

impl<'a> From<&'a Weight> for HeadMatrix<'a> {
    fn from(weight: &'a Weight) -> Self {
        Self(Source::Weight(weight))
    }
}

impl HeadMatrix<'_> {
    /// What the gradient goes to: in the type of x, or f32 beside bf16. Its values may mean nothing.
    fn leaf(&self, x: &Tensor) -> Tensor {
        match self.0 {
            Source::Tensor(tensor) => tensor.shallow_clone(),
            Source::Weight(weight) if x.kind() == Kind::BFloat16 => weight.grad_leaf().shallow_clone(),
            Source::Weight(weight) => weight.to(x.kind()),
        }
    }

    /// What the products take, in the type of x, dense and without autograd.
    fn factor(&self, x: &Tensor) -> Result<Tensor> {
        let values = match self.0 {
            Source::Weight(weight) if linear::meets_bf16_copy(x, weight) => return weight.bf16(),
            Source::Weight(weight) => weight.master(),
            Source::Tensor(tensor) => tensor,
        };
        Ok(tch::no_grad(|| values.f_to_kind(x.kind())?.f_contiguous())?.f_detach()?)
    }
}

/// The most bytes that logits take at a time on CUDA unless a caller says otherwise: half a GiB, enough rows for the matrix products to
/// run at full speed.
pub const LOGITS_BYTES: u64 = 512 << 20;

/// The most that they may take, whatever a caller allows: the kernels count a chunk's elements in 32 bits.
pub const MAX_LOGITS_BYTES: u64 = 2 << 30;

/// Whether the logits of so many tokens in bf16 are one chunk of [`linear_cross_entropy_within`] on CUDA.
///
/// ```
/// use flowhn_nn::{LOGITS_BYTES, logits_are_one_chunk};
/// assert!(logits_are_one_chunk(4096, 65_536, LOGITS_BYTES) && !logits_are_one_chunk(4352, 65_536, LOGITS_BYTES));
/// ```
pub fn logits_are_one_chunk(n_tokens: usize, vocab_size: usize, logits_bytes: u64) -> bool {
    cuda::head::is_one_chunk(n_tokens as i64, vocab_size as i64, logits_bytes)
}

/// Returns the mean over tokens of `-ln softmax(x W^T)[target]`, leaving out tokens whose target is `ignore_index`.
///
/// The logits are computed in chunks of rows. Where a gradient is wanted, each chunk's logits become their own gradient
/// at once and the gradients of `x` and `W` are done when this returns; the backward only scales them (on CUDA in
/// place, so that a second one through the same loss is an error). The softmax and the loss are f32 (f64 for f64
/// inputs), and with bf16 inputs the gradient of `W` is summed in f32; where it is bf16 itself and all tokens are one chunk on
/// CUDA, its product rounds it. If every target is ignored, the loss and the gradients are 0.
///
/// On CUDA nothing waits for the device, so a target outside the vocabulary is no error there: it makes the loss and
/// the gradients NaN. [`check_ids`](crate::check_ids) finds it before targets are copied to the device. The logits of a
/// chunk, or the exponentials in their place, take at most [`LOGITS_BYTES`] ([`linear_cross_entropy_within`] takes another number).
///
/// # Shapes
/// - `x_td`: `[n_tokens, d_model]`, f32, bf16 or, on the CPU, f64
/// - `weight_vd`: `[vocab_size, d_model]`, a tensor or a [`Weight`]; see [`HeadMatrix`]
/// - `targets_t`: `[n_tokens]`, i64, each in `0..vocab_size` or `ignore_index`
/// - returns a scalar, f32 (f64 for f64 inputs), in nats a token
///
/// ```
/// use flowhn_nn::linear_cross_entropy;
/// use tch::{Device, Kind, Tensor};
/// let x = Tensor::zeros([3, 4], (Kind::Float, Device::Cpu));
/// let weight = Tensor::randn([16, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
/// let loss = linear_cross_entropy(&x, &weight, &Tensor::from_slice(&[1i64, -100, 7]), -100)?;
/// assert!((loss.double_value(&[]) - 16f64.ln()).abs() < 1e-6);
/// loss.backward();
/// assert_eq!(weight.grad().size(), [16, 4]);
/// # Ok::<(), flowhn_nn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`] or [`Error::Device`], naming the argument at fault; [`Error::Invalid`] with the
/// position and value of a target outside the vocabulary (on the CPU).
pub fn linear_cross_entropy<'a>(
    x_td: &Tensor,
    weight_vd: impl Into<HeadMatrix<'a>>,
    targets_t: &Tensor,
    ignore_index: i64,
) -> Result<Tensor> {
    linear_cross_entropy_within(x_td, weight_vd, targets_t, ignore_index, LOGITS_BYTES)
}

/// As [`linear_cross_entropy`], with at most `logits_bytes` for the logits of a chunk on CUDA, but no fewer than those of 256 tokens
/// and never more than [`MAX_LOGITS_BYTES`]. Every chunk writes the gradient of `W`, and all but the first read it: fewer and larger
/// chunks save that traffic. On the CPU, where chunks stay in the caches, the number changes nothing.
///
/// # Errors
/// As there.
pub fn linear_cross_entropy_within<'a>(
    x_td: &Tensor,
    weight_vd: impl Into<HeadMatrix<'a>>,
    targets_t: &Tensor,
    ignore_index: i64,
    logits_bytes: u64,
) -> Result<Tensor> {
    const OP: &str = LinearCrossEntropyCpu::NAME;
    let weight_vd = weight_vd.into();
    let leaf_vd = weight_vd.leaf(x_td);
    check_arguments(OP, x_td, &leaf_vd, targets_t)?;
    let inputs = [x_td, &leaf_vd, targets_t, &weight_vd.factor(x_td)?];
    let mut outputs = match x_td.device() {
        Device::Cpu => apply(LinearCrossEntropyCpu { ignore_index }, &inputs)?,
        Device::Cuda(_) => apply(LinearCrossEntropyCuda::new(ignore_index, logits_bytes, leaf_vd.kind()), &inputs)?,
        got => return Err(no_kernel(OP, "x_td", got)),
    };
    Ok(outputs.swap_remove(0))
}

/// Returns `-ln softmax(x W^T)[target]` of each token, 0 where the target is `ignore_index`. Not differentiable.
///
/// # Shapes
/// As [`linear_cross_entropy`]; returns `[n_tokens]`, f32 (f64 for f64 inputs).
///
/// ```
/// use flowhn_nn::token_losses;
/// use tch::{Device, Kind, Tensor};
/// let x = Tensor::from_slice(&[1f32, 0., 0., 1.]).view([2, 2]);
/// let weight = Tensor::eye(2, (Kind::Float, Device::Cpu));
/// let losses = token_losses(&x, &weight, &Tensor::from_slice(&[0i64, -100]), -100)?;
/// assert!((losses.double_value(&[0]) - (1f64 + (-1f64).exp()).ln()).abs() < 1e-6);
/// assert_eq!(losses.double_value(&[1]), 0.);
/// # Ok::<(), flowhn_nn::Error>(())
/// ```
///
/// # Errors
/// Those of [`linear_cross_entropy`].
pub fn token_losses<'a>(
    x_td: &Tensor,
    weight_vd: impl Into<HeadMatrix<'a>>,
    targets_t: &Tensor,
    ignore_index: i64,
) -> Result<Tensor> {
    const OP: &str = "token_losses";
    let weight_vd = weight_vd.into();
    check_arguments(OP, x_td, &weight_vd.leaf(x_td), targets_t)?;
    let factor_vd = weight_vd.factor(x_td)?;
    match x_td.device() {
        Device::Cpu => {}
        Device::Cuda(_) => {
            return tch::no_grad(|| cuda::head::token_losses(x_td, &factor_vd, targets_t, ignore_index));
        }
        got => return Err(no_kernel(OP, "x_td", got)),
    }
    let targets_t = targets_t.contiguous();
    let targets = check_ids(OP, "targets_t", &targets_t, factor_vd.size()[0], Some(ignore_index))?;
    tch::no_grad(|| {
        for_float_kind!(OP, "x_td", x_td.kind(),
            T => head::losses::<T>(&x_td.contiguous(), &factor_vd, targets, ignore_index))
    })
}

fn check_arguments(op: &'static str, x_td: &Tensor, weight_vd: &Tensor, targets_t: &Tensor) -> Result<()> {
    let [n_tokens, d_model] = check::dims(op, "x_td", x_td, "[n_tokens, d_model]")?;
    let [vocab_size, _] = check::dims(op, "weight_vd", weight_vd, "[vocab_size, d_model]")?;
    check::shape(op, "weight_vd", weight_vd, &[vocab_size, d_model])?;
    check::shape(op, "targets_t", targets_t, &[n_tokens])?;
    check::kind(op, "x_td", x_td, &[Kind::Float, Kind::BFloat16, Kind::Double])?;
    let master_kind = if x_td.kind() == Kind::BFloat16 { Kind::Float } else { x_td.kind() };
    check::kind(op, "weight_vd", weight_vd, &[x_td.kind(), master_kind])?;
    check::kind(op, "targets_t", targets_t, &[Kind::Int64])?;
    check::device(op, "weight_vd", weight_vd, x_td.device())?;
    check::device(op, "targets_t", targets_t, x_td.device())?;
    if vocab_size == 0 {
        return Err(Error::invalid(op, "weight_vd has no rows: the vocabulary is empty"));
    }
    Ok(())
}

/// The inputs are x, the leaf that the gradient of the weight goes to, the targets, and the weight in the type of x.
struct LinearCrossEntropyCpu {
    ignore_index: i64,
}

impl Function for LinearCrossEntropyCpu {
    const NAME: &'static str = "linear_cross_entropy";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let (x, targets, weight) = (inputs[0].contiguous(), inputs[2].contiguous(), inputs[3]);
        let targets = check_ids(Self::NAME, "targets_t", &targets, weight.size()[0], Some(self.ignore_index))?;
        let wanted = head::Wanted { x: ctx.needs_grad(0), weight: ctx.needs_grad(1) };
        let done = for_float_kind!(Self::NAME, "x_td", x.kind(),
            T => head::loss_and_grads::<T>(&x, weight, targets, self.ignore_index, wanted, inputs[1].kind()))?;
        if ctx.is_recorded() {
            // A gradient that nobody wants is saved as an empty tensor, so that the positions stay fixed.
            for grad in [done.dx, done.dweight] {
                ctx.save(&grad.unwrap_or_else(|| Tensor::empty([0], (x.kind(), x.device()))));
            }
        }
        Ok(vec![done.loss])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        // On the CPU the incoming gradient can be read for free; it is 1 whenever the loss is the end of the graph.
        let is_one = grads[0].double_value(&[]) == 1.;
        let scaled = |input_idx: usize| {
            let grad = &ctx.saved()[input_idx];
            ctx.needs_grad(input_idx).then(|| match is_one {
                true => grad.shallow_clone(),
                false => (grad * &grads[0]).to_kind(grad.kind()),
            })
        };
        Ok(vec![scaled(0), scaled(1), None, None])
    }
}
