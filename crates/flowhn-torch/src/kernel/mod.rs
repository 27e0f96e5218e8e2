//! CUDA kernels of our own: compiled by NVRTC when first needed, launched on tensors in libtorch's current stream.
//!
//! A kernel is one `.cu` file, embedded by `include_str!`, that may include the common headers in the folder `kernels/` of this crate
//! and those that its [`KernelSource`] brings, and nothing else, so that no CUDA toolkit is needed to run it. Its variants (dtypes,
//! tile sizes) are chosen by integer macros. Machine code is kept on disk, see [`cache_dir`]. With `FLOWHN_KERNEL_TRACE=DIR` in the
//! environment launches are recorded for `flowhn-replay`, which launches them again without libtorch.

mod boxes;
mod cache;
mod columns;
pub(crate) mod driver;
pub(crate) mod memset;
mod nvrtc;
pub mod rows;
mod trace;

use tch::{Device, Tensor};

use crate::{Error, Result};
use driver::Start;

pub use boxes::Boxes;
pub use cache::{cache_dir, cache_problem};
pub use columns::ColumnSums;
pub(crate) use driver::MIN_CAPABILITY;
pub use nvrtc::{Compiled, EntryResources, compile};
pub use trace::DIR as TRACE_DIR;

/// The source of one `.cu` file.
#[derive(Debug)]
pub struct KernelSource {
    /// The file's name, for messages and the disk cache.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
    /// Names and texts of the headers that it includes beside the common ones.
    pub headers: &'static [(&'static str, &'static str)],
}

/// Macros that choose a variant: `("X_KIND", 1)` compiles with `-DX_KIND=1`.
pub type Defines<'a> = &'a [(&'static str, i64)];

/// The variants of one source that a crate uses: tests compile each of them for Hopper, the first and the last for the others.
#[derive(Debug)]
pub struct KernelSpec {
    /// The source.
    pub source: &'static KernelSource,
    /// The macros of each variant.
    pub variants: &'static [Defines<'static>],
}

/// The kernels of this crate.
pub const KERNELS: &[KernelSpec] = &[crate::timeline::KERNELS, memset::KERNELS, columns::KERNELS];

/// Architectures that every kernel compiles for: Ampere, Hopper, Blackwell.
pub const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_100"];

/// One entry of one variant, ready to be launched.
#[derive(Clone, Copy, Debug)]
pub struct Kernel<'a> {
    /// The source.
    pub source: &'static KernelSource,
    /// The name of its `extern "C" __global__` function.
    pub entry: &'static str,
    /// The macros of the variant.
    pub defines: Defines<'a>,
}

/// One argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    /// The address of a tensor's first element; strides travel as integers.
    Tensor(&'a Tensor),
    /// As `Tensor`, for a table of addresses, of which the kernel reaches those of other tensors' first elements.
    Addresses {
        /// i64, contiguous. Numbers may stand among the addresses.
        table: &'a Tensor,
        /// The tensors whose addresses may be in it, for the recorder of launches: nothing else asks.
        reached: &'a [&'a Tensor],
    },
    /// A matrix of which boxes are copied, a `const __grid_constant__ BoxMap` of `ptx.cuh`. On compute capability 9.0 and newer.
    Boxes(Boxes<'a>),
    /// A null pointer.
    Null,
    /// An `int`.
    I32(i32),
    /// A `long long`.
    I64(i64),
    /// A `float`.
    F32(f32),
}

impl<'a> Arg<'a> {
    /// A tensor that may be absent.
    pub fn opt(tensor: Option<&'a Tensor>) -> Self {
        tensor.map_or(Self::Null, Self::Tensor)
    }

    fn n_bytes(self) -> usize {
        match self {
            Self::Tensor(_) | Self::Addresses { .. } | Self::Null | Self::I64(_) => 8,
            Self::I32(_) | Self::F32(_) => 4,
            Self::Boxes(_) => boxes::MAP_BYTES,
        }
    }

    /// The tensor behind the argument, if it is one.
    fn tensor(self) -> Option<&'a Tensor> {
        match self {
            Self::Tensor(tensor)
            | Self::Addresses { table: tensor, .. }
            | Self::Boxes(Boxes { matrix: tensor, .. }) => Some(tensor),
            Self::Null | Self::I32(_) | Self::I64(_) | Self::F32(_) => None,
        }
    }

    /// What the driver reads, low bytes first; of a matrix its address, from which the map is made.
    fn bits(self) -> u64 {
        match self {
            Self::Tensor(tensor)
            | Self::Addresses { table: tensor, .. }
            | Self::Boxes(Boxes { matrix: tensor, .. }) => tensor.data_ptr() as u64,
            Self::Null => 0,
            Self::I32(value) => u64::from(value as u32),
            Self::I64(value) => value as u64,
            Self::F32(value) => u64::from(value.to_bits()),
        }
    }
}

impl Kernel<'_> {
    /// Launches the kernel in the current stream of the device that its tensors are on. A grid without blocks is no launch.
    ///
    /// `grid` counts blocks in x, y and z, `block` the threads of a block, all in x, `shared_bytes` the dynamic shared memory of a block. Nothing is
    /// recorded for autograd, and what the kernel writes is not noticed as an edit in place: launch inside of a [`Function`](crate::Function), write
    /// tensors that were made for it, and announce others by [`ForwardCtx::overwrite`](crate::ForwardCtx::overwrite).
    ///
    /// ```no_run
    /// use flowhn_torch::kernel::{Arg, Kernel, KernelSource};
    /// use tch::{Device, Kind, Tensor};
    ///
    /// static SCALE: KernelSource = KernelSource {
    ///     name: "scale.cu",
    ///     headers: &[],
    ///     text: r#"extern "C" __global__ void scale(const float* x, float* y, int n, float factor) {
    ///         int i = blockIdx.x * blockDim.x + threadIdx.x;
    ///         if (i < n) y[i] = factor * x[i];
    ///     }"#,
    /// };
    /// let x = Tensor::randn([1000], (Kind::Float, Device::Cuda(0)));
    /// let y = x.empty_like();
    /// let args = [Arg::Tensor(&x), Arg::Tensor(&y), Arg::I32(1000), Arg::F32(2.)];
    /// Kernel { source: &SCALE, entry: "scale", defines: &[] }.launch([4, 1, 1], 256, 0, &args)?;
    /// # Ok::<(), flowhn_torch::Error>(())
    /// ```
    ///
    /// The first launch of a variant on a device compiles it or reads it from the cache. Later ones cost a few microseconds and never
    /// wait for the device. The number and the sizes of the arguments are compared with those that the compiled kernel declares;
    /// that it stays inside its tensors is the kernel's own duty.
    ///
    /// A tensor that was made on another stream has to be recorded here by [`crate::record_stream`], as with any operator.
    ///
    /// # Errors
    /// [`Error::Device`] if a tensor is not on the CUDA device of the first one; [`Error::Kernel`] if the arguments are not what the
    /// kernel declares, it does not compile, or the driver refuses it, with the driver's reason.
    pub fn launch(&self, grid: [u32; 3], block: u32, shared_bytes: usize, args: &[Arg]) -> Result<()> {
        self.start(Start::InTurn, grid, block, shared_bytes, args)
    }

    /// As [`Kernel::launch`], for a kernel that may start before the one in front of it in the stream has ended: that hides what a launch
    /// and the other's last blocks take (programmatic dependent launch; from compute capability 9.0 on, before it is `launch`).
    ///
    /// Its blocks take their places when every block in front has called `let_next_kernel_start` of `ptx.cuh` or has ended. So every
    /// thread has to call `wait_for_kernel_in_front` before it reads or writes global memory for the first time; that it does is the
    /// kernel's own duty. What follows in the stream is launched as ever: this kernel ends after the one that it waits for, and so
    /// whoever waits for this one waits for both.
    ///
    /// # Errors
    /// As [`Kernel::launch`].
    pub fn launch_early(&self, grid: [u32; 3], block: u32, shared_bytes: usize, args: &[Arg]) -> Result<()> {
        self.start(Start::Early, grid, block, shared_bytes, args)
    }

    fn start(&self, start: Start, grid: [u32; 3], block: u32, shared_bytes: usize, args: &[Arg]) -> Result<()> {
        let device_idx = self.device_of(args)?;
        if grid.contains(&0) {
            return Ok(());
        }
        driver::launch(self, device_idx, grid, block, shared_bytes, args, start)
    }

    fn device_of(&self, args: &[Arg]) -> Result<usize> {
        let mut found = None;
        for tensor in args.iter().filter_map(|arg| arg.tensor()) {
            let device = tensor.device();
            match (device, found) {
                (Device::Cuda(device_idx), None) => found = Some(device_idx),
                (Device::Cuda(device_idx), Some(first)) if device_idx == first => {}
                _ => {
                    let want = found.map_or("a CUDA device".to_owned(), |first| format!("Cuda({first})"));
                    return Err(Error::Device { op: self.entry, arg: "tensor", got: device, want });
                }
            }
        }
        found.ok_or_else(|| self.error("no argument is a tensor, so there is no device to run on"))
    }

    fn error(&self, message: impl Into<String>) -> Error {
        Error::Kernel { kernel: format!("{}/{}", self.source.name, self.entry), message: message.into() }
    }
}

/// The number of the dtype in `DtypeOf` of `flowhn.cuh`: 0 for f32, 1 for bf16.
///
/// # Errors
/// [`Error::Dtype`] for any other.
pub fn kind_define(op: &'static str, arg: &'static str, tensor: &Tensor) -> Result<i64> {
    match tensor.kind() {
        tch::Kind::Float => Ok(0),
        tch::Kind::BFloat16 => Ok(1),
        got => Err(Error::Dtype {
            op,
            arg,
            got,
            want: "Float or BFloat16 on a CUDA device (Double runs on the CPU only)".to_owned(),
        }),
    }
}
