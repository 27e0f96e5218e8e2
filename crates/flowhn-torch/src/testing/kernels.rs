//! Compiling kernels in tests that have no GPU.

use crate::Result;
use crate::kernel::{ARCHITECTURES, KernelSpec, compile};

/// Compiles every variant of every kernel for every architecture and returns one line an entry: registers, shared memory, spills.
///
/// # Errors
/// [`crate::Error::Kernel`] with the compiler's messages.
pub fn compile_all(kernels: &[KernelSpec]) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for spec in kernels {
        for variant in spec.variants {
            for arch in ARCHITECTURES {
                for entry in compile(spec.source, variant, arch)?.entries {
                    lines.push(format!(
                        "{arch} {}/{} {variant:?}: {} registers, {} bytes shared, {} bytes spilled",
                        spec.source.name, entry.entry, entry.registers, entry.shared_bytes, entry.spill_bytes
                    ));
                }
            }
        }
    }
    Ok(lines)
}
