//! The operations of state-space models on libtorch tensors, with gradients: selective scan (Mamba-1), SSD (Mamba-2),
//! causal depthwise convolution, their single-token forms for decoding, and the two mixers built from them.
//!
//! Everything is laid out `[batch, seq_len, channels]` and takes any strides, so nothing needs a transpose. A sequence may start
//! from a state and returns its final state, both differentiable; packed documents reset the state where they begin.
//! On the CPU the operations run on all cores through rayon, with backward passes written by hand that recompute states in
//! chunks instead of storing them.
//!
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod args;
mod conv;
mod cpu;
mod mixer;
pub mod reference;
mod scan;
mod ssd;

pub use conv::{Activation, CausalConv1d, CausalConv1dOutput, CausalConv1dStep, causal_conv1d, causal_conv1d_step};
pub use flowhn_torch::{Error, Result};
pub use mixer::{Mamba1, Mamba1Config, Mamba2, Mamba2Config, SsmConfig, SsmInit, SsmMixer, SsmState};
pub use scan::{
    DtActivation, SelectiveScan, SelectiveScanOutput, SelectiveScanStep, selective_scan, selective_scan_step,
};
pub use ssd::{Ssd, SsdOutput, SsdStep, ssd, ssd_step};
