#![doc = include_str!("../README.md")]
#![deny(missing_docs)]

pub mod activity;
mod capture;
pub mod check;
pub mod cpu;
mod devices;
mod error;
mod exit;
mod ffi;
mod flag;
mod function;
#[cfg_attr(not(flowhn_cuda), path = "graph_absent.rs")]
mod graph;
pub mod kernel;
mod mapped;
mod memory;
pub mod op;
mod pieces;
mod product;
#[cfg(feature = "testing")]
pub mod selftest;
mod stream;
#[cfg(feature = "testing")]
pub mod testing;
pub mod timeline;

pub use devices::{CudaProblem, cuda_problem, n_cuda_devices};
pub use error::{Error, Result, catch};
pub use exit::exit_now;
pub use flag::Flag;
pub use function::{BackwardCtx, ForwardCtx, Function, apply, clear_grad};
pub use graph::{CaptureMode, Graph, GraphPool};
pub use mapped::MappedFile;
pub use memory::{DeviceProperties, MemoryStats, keep_freed_host_memory};
pub use pieces::split_features;
pub use product::{Sum, product, product_into};
pub use stream::{Event, Priority, SideStream, Stream, StreamGuard, fork_join, record_stream};

/// Folder of the libtorch that this process runs on.
///
/// # Errors
/// [`Error::Torch`] where the dynamic linker cannot place libc10.
pub fn torch_lib_dir() -> Result<std::path::PathBuf> {
    let mut out = std::ptr::null_mut();
    // SAFETY: on status 0 the shim wrote a malloc'ed C string, which `take_string` frees.
    let text = unsafe {
        ffi::status(ffi::flowhn_torch_lib_dir(&mut out))?;
        ffi::take_string(out)
    };
    Ok(text.into())
}

/// Whether this build can use CUDA: libtorch_cuda and the CUDA headers were there when it was compiled.
pub const BUILT_WITH_CUDA: bool = cfg!(flowhn_cuda);
