//! The layers that every branch of a FlowHN block shares: named parameters and their initial values, linear maps,
//! normalisation, the SwiGLU MLP, the embedding, and the LM head with its cross-entropy.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod bf16_copy;
mod bf16_grad;
mod cuda;
mod embedding;
mod fp8;
mod grad_place;
mod init;
mod kernels;
mod linear;
mod linear_bf16;
mod loss;
mod norm;
mod params;
pub mod reference;
mod residual;
mod rows;
#[cfg(feature = "selftest")]
pub mod selftest;
pub mod simd;
mod swiglu;

pub use bf16_copy::{Written, mark_written};
pub use embedding::{Embedding, check_ids, embedding};
pub use flowhn_torch::{Error, Result};
pub use fp8::{Activations, Fp8Paused, Fp8Place, Fp8Projections, Rounding};
pub use init::Init;
pub use kernels::KERNELS;
pub use linear::{Bias, Linear, linear};
pub use loss::{
    HeadMatrix, LOGITS_BYTES, MAX_LOGITS_BYTES, linear_cross_entropy, linear_cross_entropy_within,
    logits_are_one_chunk, token_losses,
};
pub use norm::{RmsNorm, gated_rms_norm, residual_norm, residual_norm_to, rms_norm};
pub use params::{Decay, Param, Params, Path, Weight};
pub use residual::Residual;
pub use swiglu::{SwiGluMlp, swiglu};

/// The example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
