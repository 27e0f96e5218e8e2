//! What AdamW keeps of its means between two updates.

use std::fmt;

use flowhn_torch::catch;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::blockwise::{BLOCK, Codes};
use crate::Result;

/// Tensors with fewer elements keep fp32 means where others keep codes, as in Dettmers' implementation: they cost nothing, and norms
/// and biases are sensitive.
pub(super) const LEAST_CODED: usize = 4096;

/// The type in which [`AdamW`](super::AdamW) keeps its two means between updates. An update computes in f32, whatever the type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StateType {
    /// 32-bit floats: 8 bytes a parameter.
    #[default]
    Fp32,
    /// bfloat16, rounded up or down at random such that the expectation is exact: 4 bytes a parameter.
    ///
    /// Rounding to the nearest would do harm: a mean moves by a share of `1 - beta` of its distance in an update, and what is below half
    /// a unit in the last place, 1/512 to 1/256 of the value, would be lost every time. With `beta2 = 0.999` a mean square would never
    /// shrink. The random bits are a function of the update's number, the parameter and the element, so equal runs stay equal.
    Bf16,
    /// 8-bit codes with an f32 factor for each 256 elements (Dettmers et al., "8-bit optimizers via block-wise quantization"), a little
    /// above 2 bytes a parameter. Tensors of fewer than 4096 elements stay fp32.
    ///
    /// Codes are those of the paper's dynamic map, signed for the mean and unsigned for the mean square, and a value takes the nearest
    /// one; only a mean square that is not 0 never becomes 0, since the update divides by its root.
    Int8,
}

impl StateType {
    /// Bytes of both means of that many elements, as if in one tensor.
    pub fn n_bytes(self, n_elements: u64) -> u64 {
        match self {
            StateType::Fp32 => 8 * n_elements,
            StateType::Bf16 => 4 * n_elements,
            StateType::Int8 => 2 * (n_elements + 4 * n_elements.div_ceil(BLOCK as u64)),
        }
    }
}

impl fmt::Display for StateType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StateType::Fp32 => "fp32",
            StateType::Bf16 => "bf16",
            StateType::Int8 => "int8",
        })
    }
}

/// One of the means of a parameter.
#[derive(Debug)]
pub(super) struct Mean {
    /// In the shape of the parameter: f32 (f64 for a parameter of that type), bf16, or codes as u8.
    pub values: Tensor,
    /// The largest magnitude of each block of codes, f32 `[n_blocks]`.
    pub absmax: Option<Tensor>,
}

impl Mean {
    /// Zeros for a parameter.
    pub fn zeros(param: &Tensor, state: StateType, codes: &Codes) -> Result<Self> {
        let n_elements = param.numel();
        Ok(catch(|| {
            let of = |kind| param.detach().f_zeros_like()?.f_to_kind(kind);
            Ok(match state {
                StateType::Int8 if n_elements >= LEAST_CODED => Self {
                    values: of(Kind::Uint8)?.f_fill_(i64::from(codes.zero()))?,
                    absmax: Some(Tensor::f_zeros([n_elements.div_ceil(BLOCK) as i64], (Kind::Float, param.device()))?),
                },
                StateType::Bf16 => Self { values: of(Kind::BFloat16)?, absmax: None },
                StateType::Int8 | StateType::Fp32 => Self { values: param.detach().f_zeros_like()?, absmax: None },
            })
        })?)
    }
}
