//! Projections whose products are taken in 8-bit floats while a model trains: activations and weights in E4M3, gradients of outputs in
//! E5M2, sums in f32. `docs/numerics.md` tells what that costs in precision.
//!
//! A tensor is rounded with one scale, a power of two that follows from the largest values of the steps before (`scales`), so that one
//! pass reads it, rounds it in both orders that products want (`cast`), and finds the largest value for the steps to come. All numbers
//! are on the device. What only one projection reads is rounded where it is computed, if that kernel can (`place`). The weights are rounded once a step, from their bf16 copies (`weight`).
//!
//! On CUDA that takes a device of compute capability 8.9 or more; on the CPU the same values come from plain operators, slowly.

mod cast;
mod format;
mod linear;
mod mlp;
mod place;
mod scales;
mod weight;

pub(crate) use linear::LinearFp8;
pub(crate) use mlp::MlpFp8;
pub use place::{Activations, Fp8Place, Rounding};
pub(crate) use scales::Scales as Fp8Scales;
pub(crate) use weight::{Fp8Copy, check_activations};
pub use weight::{Fp8Paused, Fp8Projections};
#[cfg(feature = "selftest")]
pub(crate) use {
    cast::{Rounded, cast},
    scales::{Role, next as next_scales},
};
