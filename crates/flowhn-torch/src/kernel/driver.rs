//! Loading and launching through the CUDA driver, in the context that libtorch uses.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use cudarc::driver::{result, sys};
use flowhn_trace::Extent;
use xxhash_rust::xxh3::xxh3_128;

use super::{Arg, Kernel, nvrtc, trace};
use crate::devices::too_old;
use crate::stream::Stream;
use crate::{DeviceProperties, Error, Result};

/// Shared memory that a block gets without asking, with what the kernel itself declares.
const DEFAULT_SHARED_BYTES: usize = 48 << 10;
/// The oldest architecture that the kernels are written for: bf16 matrix instructions and asynchronous copies.
pub(crate) const MIN_CAPABILITY: u32 = 80;

/// The first architecture on which a kernel can start before the one in front of it has ended.
const EARLY_START_CAPABILITY: u32 = 90;

/// When a kernel may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// When all that precedes it in its stream has ended.
    InTurn,
    /// When the blocks of the kernel in front of it have said so, or have ended; where the device cannot do that, in its turn.
    Early,
}

/// A kernel in the memory of one device, for the life of the process.
struct Loaded {
    function: sys::CUfunction,
    context: sys::CUcontext,
    can_start_early: bool,
    arg_bytes: Vec<usize>,
    /// The dynamic shared memory that a block may have as of now, beside what the kernel declares, and at most.
    shared_bytes: AtomicUsize,
    max_shared_bytes: usize,
}

// SAFETY: both handles are names that the driver resolves; its functions may be called with them from any thread.
unsafe impl Send for Loaded {}
// SAFETY: as above; the only part that changes is atomic.
unsafe impl Sync for Loaded {}

pub(super) fn launch(
    kernel: &Kernel,
    device_idx: usize,
    grid: [u32; 3],
    block: u32,
    shared_bytes: usize,
    args: &[Arg],
    start: Start,
) -> Result<()> {
    let loaded = loaded(kernel, device_idx)?;
    check_args(kernel, &loaded, args)?;
    let _context = Context::enter(loaded.context).map_err(|error| refused(kernel, &error))?;
    reserve_shared(kernel, &loaded, shared_bytes)?;
    let stream = Stream::current(device_idx)?.native_handle()?;
    if let Some(recorder) = trace::recorder(kernel)? {
        let live = Live { kernel, device_idx, stream: stream.cast() };
        let (variant, is_captured) = (key(kernel, None, device_idx), live.is_captured()?);
        recorder.record(&trace::Call { kernel, variant, grid, block, shared_bytes, args, is_captured }, &live)?;
    }
    let mut values: Vec<u64> = args.iter().map(|arg| arg.bits()).collect();
    let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| (value as *mut u64).cast()).collect();
    let boxes = args
        .iter()
        .enumerate()
        .filter_map(|(idx, arg)| if let Arg::Boxes(boxes) = arg { Some((idx, boxes)) } else { None });
    let maps = boxes.map(|(idx, boxes)| Ok((idx, boxes.map()?))).collect::<std::result::Result<Vec<_>, String>>();
    let mut maps = maps.map_err(|message| kernel.error(message))?;
    for (idx, map) in &mut maps {
        pointers[*idx] = (map as *mut sys::CUtensorMap).cast();
    }
    let mut early = [early_start()];
    let attributes = if start == Start::Early && loaded.can_start_early { &mut early[..] } else { &mut [] };
    let [x, y, z] = grid;
    let launch = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared_bytes as u32,
        hStream: stream.cast(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    };
    // SAFETY: the function is loaded in the current context; every pointer leads to a value with at least as many bytes as the
    // kernel declares for it (compared above), and the driver copies them and the attributes before it returns. The tensors' memory is
    // given back to libtorch's allocator in stream order, so it outlives the kernel, which runs in libtorch's current stream: what
    // follows in the stream waits for its end, and one that starts early ends after the kernels in front of it, for which it waits.
    let outcome =
        unsafe { sys::cuLaunchKernelEx(&launch, loaded.function, pointers.as_mut_ptr(), std::ptr::null_mut()) };
    outcome.result().map_err(|error| {
        let reason = describe(&error);
        kernel.error(format!("launch of {grid:?} blocks of {block} threads with {shared_bytes} bytes: {reason}"))
    })
}

/// The attribute of a launch that is [`Start::Early`].
fn early_start() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }
}

/// The launch's device and stream, for the recorder.
struct Live<'a> {
    kernel: &'a Kernel<'a>,
    device_idx: usize,
    stream: sys::CUstream,
}

impl Live<'_> {
    fn is_captured(&self) -> Result<bool> {
        is_captured(self.stream).map_err(|error| refused(self.kernel, &error))
    }
}

/// Whether what is enqueued on libtorch's current stream is written down and not done.
pub(crate) fn is_captured(stream: sys::CUstream) -> std::result::Result<bool, result::DriverError> {
    // SAFETY: it is libtorch's current stream.
    match unsafe { result::stream::is_capturing(stream) } {
        Ok(status) => Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE),
        // The default stream while another stream is captured that would wait for it.
        Err(result::DriverError(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT)) => Ok(true),
        Err(error) => Err(error),
    }
}

impl trace::Source for Live<'_> {
    fn cubin(&self) -> Result<Vec<u8>> {
        let arch = architecture(self.kernel, DeviceProperties::of(self.device_idx)?)?;
        nvrtc::cubin(self.kernel.source, self.kernel.defines, &arch)
    }

    fn bytes(&self, extent: Extent) -> Result<Vec<u8>> {
        let mut bytes = vec![0_u8; extent.n_bytes as usize];
        // SAFETY: the stream is libtorch's current one; the extent is that of tensors of the device, which the caller holds.
        let outcome = unsafe {
            result::stream::synchronize(self.stream).and_then(|()| result::memcpy_dtoh_sync(&mut bytes, extent.address))
        };
        outcome.map_err(|error| refused(self.kernel, &error))?;
        Ok(bytes)
    }
}

fn check_args(kernel: &Kernel, loaded: &Loaded, args: &[Arg]) -> Result<()> {
    let fits = |(arg, want): (&Arg, &usize)| arg.n_bytes() == *want;
    if args.len() == loaded.arg_bytes.len() && args.iter().zip(&loaded.arg_bytes).all(fits) {
        return Ok(());
    }
    let got: Vec<usize> = args.iter().map(|arg| arg.n_bytes()).collect();
    Err(kernel.error(format!("arguments of {got:?} bytes were given, but it takes {:?}", loaded.arg_bytes)))
}

/// Lets the kernel have more shared memory than the default.
fn reserve_shared(kernel: &Kernel, loaded: &Loaded, shared_bytes: usize) -> Result<()> {
    if shared_bytes <= loaded.shared_bytes.load(Ordering::Relaxed) {
        return Ok(());
    }
    let most = loaded.max_shared_bytes;
    if shared_bytes > most {
        let message = format!("it needs {shared_bytes} bytes of shared memory a block, this device offers {most}");
        return Err(kernel.error(message));
    }
    let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the function is loaded in the current context.
    unsafe { result::function::set_function_attribute(loaded.function, attribute, shared_bytes as c_int) }
        .map_err(|error| refused(kernel, &error))?;
    loaded.shared_bytes.fetch_max(shared_bytes, Ordering::Relaxed);
    Ok(())
}

type Table<K, V> = OnceLock<RwLock<HashMap<K, V>>>;

/// The kernel on the device, compiled and loaded if this is the first time.
fn loaded(kernel: &Kernel, device_idx: usize) -> Result<Arc<Loaded>> {
    static LOADED: Table<u128, Arc<Loaded>> = Table::new();
    // One thread compiles at a time: two that want the same variant must not both do the work.
    static COMPILING: Mutex<()> = Mutex::new(());
    let table = LOADED.get_or_init(RwLock::default);
    let key = key(kernel, Some(kernel.entry), device_idx);
    let find = || table.read().unwrap_or_else(|poisoned| poisoned.into_inner()).get(&key).cloned();
    if let Some(found) = find() {
        return Ok(found);
    }
    let _alone = COMPILING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(found) = find() {
        return Ok(found);
    }
    let loaded = Arc::new(load(kernel, device_idx)?);
    table.write().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(key, loaded.clone());
    Ok(loaded)
}

/// Identifies a variant, and an entry of it, on a device. Sources and names are statics, so their addresses stand for them.
fn key(kernel: &Kernel, entry: Option<&'static str>, device_idx: usize) -> u128 {
    let mut bytes = Vec::with_capacity(64);
    let mut push = |value: u64| bytes.extend_from_slice(&value.to_le_bytes());
    push(std::ptr::from_ref(kernel.source) as u64);
    push(device_idx as u64);
    for (name, value) in kernel.defines {
        push(name.as_ptr() as u64);
        push(name.len() as u64);
        push(*value as u64);
    }
    bytes.extend_from_slice(entry.unwrap_or_default().as_bytes());
    xxh3_128(&bytes)
}

fn load(kernel: &Kernel, device_idx: usize) -> Result<Loaded> {
    let context = primary_context(device_idx).map_err(|error| refused(kernel, &error))?;
    let _context = Context::enter(context).map_err(|error| refused(kernel, &error))?;
    let properties = DeviceProperties::of(device_idx)?;
    let module = module(kernel, device_idx, properties)?;
    let entry = CString::new(kernel.entry).map_err(|_| kernel.error("its name contains a NUL byte"))?;
    // SAFETY: the module is loaded in the current context and stays for the life of the process.
    let function = unsafe { result::module::get_function(module.0, entry) }.map_err(|error| refused(kernel, &error))?;
    let declared = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
    // SAFETY: the function is loaded in the current context.
    let declared = unsafe { result::function::get_function_attribute(function, declared) }
        .map_err(|error| refused(kernel, &error))? as usize;
    Ok(Loaded {
        function,
        context,
        can_start_early: properties.compute_capability >= EARLY_START_CAPABILITY,
        arg_bytes: arg_bytes(function),
        shared_bytes: AtomicUsize::new(DEFAULT_SHARED_BYTES.saturating_sub(declared)),
        max_shared_bytes: (properties.shared_bytes_per_block as usize).saturating_sub(declared),
    })
}

/// The sizes of the arguments that a kernel declares.
fn arg_bytes(function: sys::CUfunction) -> Vec<usize> {
    let size_of = |arg_idx| {
        let (mut offset, mut n_bytes) = (0, 0);
        // SAFETY: the function is loaded; both are places for one number.
        let outcome = unsafe { sys::cuFuncGetParamInfo(function, arg_idx, &mut offset, &mut n_bytes) };
        outcome.result().ok().map(|()| n_bytes)
    };
    (0..).map_while(size_of).collect()
}

#[derive(Clone, Copy)]
struct Module(sys::CUmodule);

// SAFETY: a module is a name that the driver resolves, from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// The module of a variant on a device; its entries share it.
fn module(kernel: &Kernel, device_idx: usize, properties: &DeviceProperties) -> Result<Module> {
    static MODULES: Table<u128, Module> = Table::new();
    let table = MODULES.get_or_init(RwLock::default);
    let key = key(kernel, None, device_idx);
    if let Some(module) = table.read().unwrap_or_else(|poisoned| poisoned.into_inner()).get(&key) {
        return Ok(*module);
    }
    let arch = architecture(kernel, properties)?;
    let cubin = nvrtc::cubin(kernel.source, kernel.defines, &arch)?;
    // SAFETY: the image is a whole cubin, which the driver copies; the context is current.
    let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) }.map_err(|error| {
        let reason = describe(&error);
        let remedy = "CUDA 13 needs driver 580 or newer: `nvidia-smi` shows yours";
        kernel.error(format!("the driver does not load code for {arch}: {reason}; {remedy}"))
    })?;
    table.write().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(key, Module(module));
    Ok(Module(module))
}

/// The architecture to compile for: the device's own, with Hopper's specific instructions where it has them.
fn architecture(kernel: &Kernel, properties: &DeviceProperties) -> Result<String> {
    let capability = properties.compute_capability;
    if capability < MIN_CAPABILITY {
        return Err(kernel.error(too_old(properties)));
    }
    let suffix = if capability == 90 { "a" } else { "" };
    Ok(format!("sm_{capability}{suffix}"))
}

/// The context that libtorch and all other users of the runtime share.
fn primary_context(device_idx: usize) -> std::result::Result<sys::CUcontext, result::DriverError> {
    // The driver's library is there: a tensor is on a CUDA device.
    result::init()?;
    let device = result::device::get(device_idx as c_int)?;
    // SAFETY: the device exists. The context is retained for the life of the process, as libtorch retains it.
    unsafe { result::primary_ctx::retain(device) }
}

/// Makes a context current on this thread until dropped; free where it is already.
pub(crate) struct Context {
    previous: Option<sys::CUcontext>,
}

impl Context {
    /// Makes the context that libtorch uses on a device current.
    pub(crate) fn of_device(device_idx: usize) -> std::result::Result<Self, result::DriverError> {
        Self::enter(primary_context(device_idx)?)
    }

    fn enter(context: sys::CUcontext) -> std::result::Result<Self, result::DriverError> {
        let current = result::ctx::get_current()?;
        if current == Some(context) {
            return Ok(Self { previous: None });
        }
        // SAFETY: the context is a primary one and retained.
        unsafe { result::ctx::set_current(context) }?;
        Ok(Self { previous: current })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Some(previous) = self.previous {
            // SAFETY: it was current before, so it exists. If the driver refuses, the next operator sets its own.
            let _ = unsafe { result::ctx::set_current(previous) };
        }
    }
}

/// The function of a kernel and its context, for a node of a graph.
pub(super) fn resident(kernel: &Kernel, device_idx: usize) -> Result<(sys::CUfunction, sys::CUcontext)> {
    let loaded = loaded(kernel, device_idx)?;
    Ok((loaded.function, loaded.context))
}

pub(super) fn refused(kernel: &Kernel, error: &result::DriverError) -> Error {
    kernel.error(describe(error))
}

fn describe(error: &result::DriverError) -> String {
    let text = |text: std::result::Result<&std::ffi::CStr, result::DriverError>| {
        text.map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
    };
    format!("{} ({})", text(error.error_string()), text(error.error_name()))
}

#[cfg(test)]
mod tests {
    use super::super::KernelSource;
    use super::*;

    #[test]
    fn sources_that_share_a_text_are_two() {
        const TEXT: &str = "extern \"C\" __global__ void any() {}";
        static BARE: KernelSource = KernelSource { name: "any.cu", text: TEXT, headers: &[] };
        static WITH_HEADER: KernelSource = KernelSource { name: "any.cu", text: TEXT, headers: &[("any.cuh", "")] };
        let key = |source, device_idx| key(&Kernel { source, entry: "any", defines: &[] }, None, device_idx);
        assert_eq!(key(&BARE, 0), key(&BARE, 0));
        assert!(key(&BARE, 0) != key(&WITH_HEADER, 0) && key(&BARE, 0) != key(&BARE, 1));
    }

    #[test]
    fn code_is_for_the_device_and_old_devices_are_refused() {
        let kernel = Kernel { source: super::super::KERNELS[0].source, entry: "any", defines: &[] };
        let of = |compute_capability| {
            let properties = DeviceProperties {
                name: "a GPU".to_owned(),
                n_multiprocessors: 1,
                compute_capability,
                total_bytes: 0,
                shared_bytes_per_block: 0,
                pci_bus_id: String::new(),
            };
            architecture(&kernel, &properties)
        };
        assert_eq!([80, 90, 100].map(|capability| of(capability).unwrap()), ["sm_80", "sm_90a", "sm_100"]);
        let error = of(75).unwrap_err().to_string();
        assert!(["a GPU", "7.5", "8.0 (Ampere)"].iter().all(|word| error.contains(word)), "{error}");
    }
}
