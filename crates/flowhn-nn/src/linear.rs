//! The affine map of all projections.

use std::fmt::Display;

use tch::{Kind, Tensor};

use flowhn_torch::{Result, apply};

use crate::fp8::{Activations, Fp8Place, LinearFp8, check_activations};
use crate::linear_bf16::LinearBf16;

use crate::{Decay, Init, Path, Weight};

/// Whether a [`Linear`] adds a bias.
#[derive(Clone, Debug, PartialEq)]
pub enum Bias {
    /// No bias.
    None,
    /// A bias with these initial values.
    Init(Init),
}

/// `y = x W^T + b` with `W: [d_out, d_in]`, in the type of `x`.
#[derive(Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Weight>,
}

impl Bias {
    /// A bias of zeros where `there` is true.
    pub fn zeros_if(there: bool) -> Self {
        if there { Self::Init(Init::Zeros) } else { Self::None }
    }
}

impl Linear {
    /// Registers `name.weight`, and `name.bias` if there is one; the bias is not decayed.
    ///
    /// # Errors
    /// [`flowhn_torch::Error::Invalid`] if the name is taken or the initial values do not fit.
    pub fn new(path: &mut Path, name: impl Display, d_in: i64, d_out: i64, init: Init, bias: Bias) -> Result<Self> {
        let mut path = path.push(name);
        let weight = path.weight("weight", &[d_out, d_in], init, Decay::Yes)?;
        weight.want_bf16_copy();
        weight.mark_projection();
        let bias = match bias {
            Bias::None => None,
            Bias::Init(init) => Some(path.weight("bias", &[d_out], init, Decay::No)?),
        };
        Ok(Self { weight, bias })
    }

    /// Maps `[.., d_in]` to `[.., d_out]`.
    ///
    /// # Errors
    /// [`flowhn_torch::Error::Torch`] if the last axis is not `d_in`; [`flowhn_torch::Error::Invalid`] for activations that were rounded
    /// for another projection.
    pub fn forward(&self, x: impl Into<Activations>) -> Result<Tensor> {
        let x = x.into();
        let Some(bias) = &self.bias else { return product(x, &self.weight) };
        let bias = bias.to(x.tensor().kind());
        if self.weight.takes_fp8() || meets_bf16_copy(x.tensor(), &self.weight) {
            return Ok(product(x, &self.weight)?.f_add(&bias)?);
        }
        let x = x.values()?;
        Ok(x.f_linear(&self.weight.to(x.kind()), Some(&bias))?)
    }

    /// Where a function may leave its output of this shape and type if nothing but this projection reads it; nowhere if that takes it as it
    /// is. Hand what it left to [`Linear::forward`] as [`Activations`], before the next step begins.
    ///
    /// # Errors
    /// [`flowhn_torch::Error::Torch`] if there is no memory.
    pub fn fp8_place(&self, shape: &[i64], kind: Kind) -> Result<Option<Fp8Place>> {
        self.weight.fp8_place(shape, kind)
    }

    /// The weight, `[d_out, d_in]`.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// The bias, `[d_out]`.
    pub fn bias(&self) -> Option<&Weight> {
        self.bias.as_ref()
    }
}

/// Returns `x W^T` in the type of `x`, which is f32, bf16 or, on the CPU, f64; the gradient of the weight is [`Weight::grad`].
///
/// On CUDA, bf16 activations meet the weight's bf16 copy, or the weight rounded for the call where none is kept, and the product that
/// is the gradient of the weight is left in f32, or in bf16 where [`Params::use_bf16_grads`](crate::Params::use_bf16_grads) asks for it.
/// Where the weight is used in fp8 ([`Params::use_fp8`](crate::Params::use_fp8)), all three products take factors rounded to that.
///
/// # Errors
/// [`flowhn_torch::Error::Torch`] if the last axis of `x` is not that of the weight; in fp8 [`flowhn_torch::Error::Shape`], and
/// [`flowhn_torch::Error::Dtype`] for activations that are not bf16.
pub fn linear(x: &Tensor, weight: &Weight) -> Result<Tensor> {
    product(x.into(), weight)
}

fn product(x: Activations, weight: &Weight) -> Result<Tensor> {
    if let Some(factors) = weight.fp8()? {
        let (x, place) = x.into_parts();
        check_activations(&x, weight)?;
        return Ok(apply(LinearFp8 { factors, place }, &[&x, weight.grad_leaf()])?.swap_remove(0));
    }
    let x = x.values()?;
    if meets_bf16_copy(x, weight) {
        let function = LinearBf16 { grad: weight.grad_place() };
        return Ok(apply(function, &[x, weight.grad_leaf(), &weight.bf16()?])?.swap_remove(0));
    }
    Ok(x.f_linear(&weight.to(x.kind()), None::<&Tensor>)?)
}

/// Whether the product takes the weight's bf16 copy instead of a cast through autograd.
pub(crate) fn meets_bf16_copy(x: &Tensor, weight: &Weight) -> bool {
    let leaves_master = x.device().is_cuda() || weight.grad_kind() == Kind::BFloat16;
    leaves_master && x.kind() == Kind::BFloat16 && weight.master().kind() == Kind::Float
}
