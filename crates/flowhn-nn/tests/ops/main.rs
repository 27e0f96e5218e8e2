//! Every operation of the crate against its reference: values, gradients, types, strides, odd sizes, bad arguments, and
//! the same bits on any number of threads.

mod embedding;
mod gated;
mod loss;
mod norm;
mod support;
mod swiglu;
