#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod args;
mod conv;
mod cpu;
mod cuda;
mod kernels;
mod mixer;
pub mod reference;
mod scan;
#[cfg(feature = "selftest")]
pub mod selftest;
mod ssd;

pub use conv::{Activation, CausalConv1d, CausalConv1dOutput, CausalConv1dStep, causal_conv1d, causal_conv1d_step};
pub use flowhn_nn::{Activations, Params, Path};
pub use flowhn_torch::{Error, Result};
pub use kernels::KERNELS;
pub use mixer::{
    GateNorm, GroupOrder, Mamba1, Mamba1Config, Mamba2, Mamba2Config, SsmConfig, SsmInit, SsmMixer, SsmState,
};
pub use scan::{
    DtActivation, SelectiveScan, SelectiveScanOutput, SelectiveScanStep, selective_scan, selective_scan_step,
};
pub use ssd::{Ssd, SsdOutput, SsdStep, ssd, ssd_step};
