//! The few functions of the CUDA driver that a launch takes. All unsafe code of the crate is here.

use std::ffi::{CString, c_int, c_void};

use anyhow::{Context as _, Result, bail};
use cudarc::driver::{result, sys};
use flowhn_trace::BoxMap;

/// Shared memory that a block gets without asking.
const DEFAULT_SHARED_BYTES: usize = 48 << 10;

/// A device whose primary context is current on this thread, for the life of the process.
pub struct Device {
    /// Contexts belong to threads, so what needs one stays on its own.
    _on_this_thread: std::marker::PhantomData<*const ()>,
}

impl Device {
    /// Makes the context of a device current.
    ///
    /// # Errors
    /// If there is no driver or no such device.
    pub fn open(idx: usize) -> Result<Self> {
        // SAFETY: this is NVIDIA's library, whose initialisers only set up the library itself.
        let library = unsafe { libloading::Library::new("libcuda.so.1") };
        // Kept for the life of the process: cudarc, which panics where there is none, finds what is loaded.
        std::mem::forget(library.context("the launches need an NVIDIA GPU with its driver")?);
        result::init().context("the CUDA driver does not start")?;
        let device = result::device::get(idx as c_int).with_context(|| format!("there is no CUDA device {idx}"))?;
        // SAFETY: the device exists; its context is retained for the life of the process.
        let context = unsafe { result::primary_ctx::retain(device) }?;
        // SAFETY: the context is retained.
        unsafe { result::ctx::set_current(context) }?;
        Ok(Self { _on_this_thread: std::marker::PhantomData })
    }

    /// Loads machine code, for the life of the process.
    ///
    /// # Errors
    /// If it is no ELF file or the driver refuses it, for one of another architecture for example.
    pub fn load(&self, cubin: &[u8]) -> Result<Module> {
        if !cubin.starts_with(b"\x7fELF") {
            bail!("the machine code is no ELF file");
        }
        // SAFETY: the image is a whole cubin, whose header tells its size, and the driver copies it; a context is current.
        let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) };
        Ok(Module(module.context("the driver does not load the machine code; is it for this device?")?))
    }

    /// Waits for all launches.
    ///
    /// # Errors
    /// What one of them did wrong. Some errors stay: then the device is lost to this process.
    pub fn synchronize(&self) -> Result<()> {
        Ok(result::ctx::synchronize()?)
    }
}

/// Loaded machine code.
pub struct Module(sys::CUmodule);

impl Module {
    /// The function of that name, with the sizes of its first `n_args` arguments.
    ///
    /// # Errors
    /// If there is none, or it has fewer arguments.
    pub fn function(&self, name: &str, n_args: usize) -> Result<Function> {
        let c_name = CString::new(name)?;
        // SAFETY: the module is loaded and stays.
        let function = unsafe { result::module::get_function(self.0, c_name) };
        let function = function.with_context(|| format!("the machine code holds no function {name}"))?;
        let size_of = |idx| {
            let (mut offset, mut n_bytes) = (0, 0);
            // SAFETY: the function is loaded; both are places for one number.
            let outcome = unsafe { sys::cuFuncGetParamInfo(function, idx, &mut offset, &mut n_bytes) };
            outcome.result().with_context(|| format!("{name} has no argument {idx}, and {n_args} were recorded"))?;
            Ok(n_bytes)
        };
        Ok(Function { function, arg_bytes: (0..n_args).map(size_of).collect::<Result<_>>()? })
    }
}

/// What a kernel is given for one of its arguments.
#[derive(Debug)]
pub enum Arg {
    /// A number or an address, low bytes first.
    Bits(u64),
    /// The map of a matrix.
    Map(sys::CUtensorMap),
}

impl Arg {
    /// The map of the matrix at an address.
    ///
    /// # Errors
    /// What the driver says if it makes none.
    pub fn map(_device: &Device, address: u64, form: &BoxMap) -> Result<Self> {
        let BoxMap { n_axes, size, strides, box_size } = form;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: every pointer but the address leads to at least as many numbers as there are axes; the driver keeps none of them, and does
        // not read what is at the address.
        let outcome = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                *n_axes,
                address as *mut c_void,
                size.as_ptr(),
                strides.as_ptr(),
                box_size.as_ptr(),
                [1; 4].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        outcome.result().with_context(|| format!("the driver makes no map of {form:?}"))?;
        Ok(Self::Map(map))
    }

    /// How many bytes the driver can read, and where.
    fn bytes(&mut self) -> (usize, *mut c_void) {
        match self {
            Self::Bits(bits) => (size_of_val(bits), std::ptr::from_mut(bits).cast()),
            Self::Map(map) => (size_of_val(map), std::ptr::from_mut(map).cast()),
        }
    }
}

/// A function of loaded machine code.
pub struct Function {
    function: sys::CUfunction,
    arg_bytes: Vec<usize>,
}

impl Function {
    /// Launches it on the default stream.
    ///
    /// # Errors
    /// If there are not as many arguments as were asked for, one is larger than what was recorded, or the driver refuses.
    pub fn launch(&self, grid: [u32; 3], block: u32, shared_bytes: usize, args: &mut [Arg]) -> Result<()> {
        let given: Vec<(usize, *mut c_void)> = args.iter_mut().map(Arg::bytes).collect();
        if given.len() != self.arg_bytes.len() || given.iter().zip(&self.arg_bytes).any(|((n, _), want)| n < want) {
            let n_bytes: Vec<usize> = given.iter().map(|(n, _)| *n).collect();
            bail!("arguments of up to {n_bytes:?} bytes were recorded, and the function takes {:?}", self.arg_bytes);
        }
        if shared_bytes > DEFAULT_SHARED_BYTES {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded in the current context.
            unsafe { result::function::set_function_attribute(self.function, attribute, shared_bytes as c_int) }
                .with_context(|| format!("{shared_bytes} bytes of shared memory"))?;
        }
        let mut pointers: Vec<*mut c_void> = given.iter().map(|(_, pointer)| *pointer).collect();
        let [x, y, z] = grid;
        // SAFETY: the recorder wrote down all arguments that the function declares; there is a pointer for each, to at least as many
        // bytes, and the driver copies them before it returns. What the kernel does with the addresses among them happens on the
        // device, to memory that this process allocated; finding out whether it stays inside is what this program is for.
        let outcome = unsafe {
            let stream = std::ptr::null_mut();
            result::launch_kernel(self.function, (x, y, z), (block, 1, 1), shared_bytes as u32, stream, &mut pointers)
        };
        outcome.context("the launch is refused")
    }
}

/// Device memory, freed when dropped.
pub struct Memory {
    start: sys::CUdeviceptr,
    lead: usize,
    n_bytes: usize,
}

impl Memory {
    /// `n_bytes` bytes that begin `lead` bytes into an allocation, which ends where they do.
    ///
    /// # Errors
    /// If there is not that much memory.
    pub fn new(_device: &Device, lead: usize, n_bytes: usize) -> Result<Self> {
        // SAFETY: a context is current; nothing takes what is in the memory for more than bytes.
        let start = unsafe { result::malloc_sync(lead + n_bytes) };
        let start = start.with_context(|| format!("no {} bytes of device memory", lead + n_bytes))?;
        Ok(Self { start, lead, n_bytes })
    }

    /// The address of the first byte.
    pub fn address(&self) -> u64 {
        self.start + self.lead as u64
    }

    /// Fills it.
    ///
    /// # Errors
    /// If there are not exactly as many bytes, or the driver refuses.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        if bytes.len() != self.n_bytes {
            bail!("{} bytes for a region of {}", bytes.len(), self.n_bytes);
        }
        // SAFETY: so many bytes are allocated at the address.
        Ok(unsafe { result::memcpy_htod_sync(self.address(), bytes) }?)
    }

    /// What it holds.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn read(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.n_bytes];
        // SAFETY: so many bytes are allocated at the address.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, self.address()) }?;
        Ok(bytes)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` and freed once; every launch was waited for. A lost device keeps it, which nobody minds.
        let _ = unsafe { result::free_sync(self.start) };
    }
}
