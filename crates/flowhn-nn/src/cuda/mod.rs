//! The operations on CUDA, by kernels of our own.

pub(crate) mod embedding;
pub(crate) mod gated_mlp;
pub(crate) mod head;
pub(crate) mod linear;
pub(crate) mod norm;
mod product_sm90;
pub(crate) mod swiglu;
