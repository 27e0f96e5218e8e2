//! The kernels of this crate.

use flowhn_torch::kernel::{KernelSource, KernelSpec};

use crate::optim::cuda;

/// [`AdamW`](crate::optim::AdamW).
pub(crate) static ADAMW: KernelSource = KernelSource {
    name: "adamw.cu",
    text: include_str!("../kernels/adamw.cu"),
    headers: &[("adamw_state.cuh", include_str!("../kernels/adamw_state.cuh"))],
};

/// Every kernel of this crate with the variants in use; a test compiles them all.
pub const KERNELS: &[KernelSpec] = &[KernelSpec { source: &ADAMW, variants: &cuda::VARIANTS }];
