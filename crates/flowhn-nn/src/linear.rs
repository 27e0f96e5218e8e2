//! The affine map of all projections.

use std::fmt::Display;

use tch::{Kind, Tensor};

use flowhn_torch::{Result, apply};

use crate::cuda::linear::LinearCuda;

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
        let bias = match bias {
            Bias::None => None,
            Bias::Init(init) => Some(path.weight("bias", &[d_out], init, Decay::No)?),
        };
        Ok(Self { weight, bias })
    }

    /// Maps `[.., d_in]` to `[.., d_out]`.
    ///
    /// # Errors
    /// [`flowhn_torch::Error::Torch`] if the last axis is not `d_in`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(|bias| bias.to(x.kind()));
        if x.device().is_cuda() && x.kind() == Kind::BFloat16 && self.weight.master().kind() == Kind::Float {
            let y = apply(LinearCuda, &[x, self.weight.master()])?.swap_remove(0);
            return bias.map_or(Ok(y.shallow_clone()), |bias| Ok(y.f_add(&bias)?));
        }
        Ok(x.f_linear(&self.weight.to(x.kind()), bias.as_ref())?)
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
