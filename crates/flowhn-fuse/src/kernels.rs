//! The kernels of this crate.

use flowhn_torch::kernel::KernelSpec;

/// Every kernel of this crate with the variants in use; a test compiles them all.
pub const KERNELS: &[KernelSpec] = &[];
