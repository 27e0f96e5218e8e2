//! The operations on CUDA, by kernels of our own.

pub(crate) mod conv;
pub(crate) mod scan;
pub(crate) mod scan_shape;
pub(crate) mod ssd;
mod ssd_chunked;
mod ssd_recurrent;
