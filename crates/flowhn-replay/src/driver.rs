//! The few functions of the CUDA driver that a launch takes. All unsafe code of the crate is here.

use std::ffi::{CString, c_int, c_void};

use anyhow::{Context as _, Result, bail};
use cudarc::driver::{result, sys};

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
    /// The function of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn function(&self, name: &str) -> Result<Function> {
        let c_name = CString::new(name)?;
        // SAFETY: the module is loaded and stays.
        let function = unsafe { result::module::get_function(self.0, c_name) };
        Ok(Function(function.with_context(|| format!("the machine code holds no function {name}"))?))
    }
}

/// A function of loaded machine code.
pub struct Function(sys::CUfunction);

impl Function {
    /// Launches it on the default stream.
    ///
    /// # Errors
    /// If the number of arguments is not what it declares, or the driver refuses.
    pub fn launch(&self, grid: [u32; 3], block: u32, shared_bytes: usize, args: &[u64]) -> Result<()> {
        let declared = self.arg_bytes();
        if declared.len() != args.len() || declared.iter().any(|&n_bytes| n_bytes > size_of::<u64>()) {
            bail!("{} arguments were recorded, and the function takes {declared:?} bytes", args.len());
        }
        if shared_bytes > DEFAULT_SHARED_BYTES {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded in the current context.
            unsafe { result::function::set_function_attribute(self.0, attribute, shared_bytes as c_int) }
                .with_context(|| format!("{shared_bytes} bytes of shared memory"))?;
        }
        let mut values = args.to_vec();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| (value as *mut u64).cast()).collect();
        let [x, y, z] = grid;
        // SAFETY: there is a pointer for each argument that the function declares, to at least as many bytes, and the driver
        // copies them before it returns. What the kernel does with the addresses among them happens on the device, to memory
        // that this process allocated; finding out whether it stays inside is what this program is for.
        let outcome = unsafe {
            let stream = std::ptr::null_mut();
            result::launch_kernel(self.0, (x, y, z), (block, 1, 1), shared_bytes as u32, stream, &mut pointers)
        };
        outcome.context("the launch is refused")
    }

    /// The sizes of the arguments that it declares.
    fn arg_bytes(&self) -> Vec<usize> {
        let size_of = |arg_idx| {
            let (mut offset, mut n_bytes) = (0, 0);
            // SAFETY: the function is loaded; both are places for one number.
            let outcome = unsafe { sys::cuFuncGetParamInfo(self.0, arg_idx, &mut offset, &mut n_bytes) };
            outcome.result().ok().map(|()| n_bytes)
        };
        (0..).map_while(size_of).collect()
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
