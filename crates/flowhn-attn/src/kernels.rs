//! The kernels of this crate.

use flowhn_torch::kernel::{KernelSource, KernelSpec};

/// [`rotary`](crate::rotary), there and back.
pub(crate) static ROTARY: KernelSource =
    KernelSource { name: "rotary.cu", text: include_str!("../kernels/rotary.cu"), headers: &[] };

/// Every kernel of this crate with the variants in use; a test compiles them all.
pub const KERNELS: &[KernelSpec] = &[KernelSpec { source: &ROTARY, variants: &[&[("X_KIND", 0)], &[("X_KIND", 1)]] }];
