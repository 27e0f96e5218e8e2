//! The operations on CUDA, by kernels of our own.

pub(crate) mod embedding;
pub(crate) mod head;
pub(crate) mod linear;
pub(crate) mod norm;
pub(crate) mod swiglu;
