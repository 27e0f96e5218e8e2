//! Declarations of the C++ shim. Private: every function here is called from exactly one safe wrapper.

use std::ffi::{CStr, c_char, c_int, c_void};

use torch_sys::C_tensor;

use crate::{Error, Result};

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RawStream {
    pub id: i64,
    pub device_index: i64,
    pub device_type: i64,
}

#[repr(C)]
pub(crate) struct FunctionTable {
    pub backward: unsafe extern "C" fn(
        data: *mut c_void,
        node: *const c_void,
        saved: *mut *mut C_tensor,
        n_saved: usize,
        grads: *mut *mut C_tensor,
        n_grads: usize,
        needs_grad: *const u8,
        out: *mut *mut C_tensor,
        n_out: usize,
        error: *mut *mut c_char,
    ) -> c_int,
    pub grad_place: unsafe extern "C" fn(data: *mut c_void, output_idx: usize) -> *mut C_tensor,
    pub drop: unsafe extern "C" fn(data: *mut c_void),
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct RawMemory {
    pub allocated: i64,
    pub allocated_peak: i64,
    pub reserved: i64,
    pub reserved_peak: i64,
    pub n_ooms: i64,
    pub n_alloc_retries: i64,
    pub free: i64,
    pub total: i64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RawArg {
    pub tag: i64,
    pub i: i64,
    pub d: f64,
    pub p: *const c_void,
    pub n: usize,
}

/// A flag of an output of a function: it has no gradient. `autograd.cpp` has the same.
pub(crate) const NON_DIFFERENTIABLE: u8 = 1;
/// Another: a gradient that is not there stays an undefined tensor.
pub(crate) const ACCEPTS_UNDEFINED_GRAD: u8 = 2;

unsafe extern "C" {
    fn flowhn_last_error() -> *const c_char;
    pub(crate) fn flowhn_grad_mode_get() -> c_int;
    pub(crate) fn flowhn_grad_mode_set(enabled: c_int);
    pub(crate) fn flowhn_grad_clear(tensor: *mut C_tensor) -> c_int;
    pub(crate) fn flowhn_function_is_recorded(inputs: *const *const C_tensor, n_inputs: usize) -> c_int;
    pub(crate) fn flowhn_function_attach(
        name: *const c_char,
        inputs: *const *const C_tensor,
        n_inputs: usize,
        outputs: *const *const C_tensor,
        n_outputs: usize,
        output_flags: *const u8,
        saved: *const *const C_tensor,
        n_saved: usize,
        function: FunctionTable,
        data: *mut c_void,
        result: *mut *mut C_tensor,
    ) -> c_int;
    pub(crate) fn flowhn_function_grad_place(node: *const c_void, input_idx: usize, out: *mut *mut C_tensor) -> c_int;
    pub(crate) fn flowhn_stream_current(index: i64, out: *mut RawStream) -> c_int;
    pub(crate) fn flowhn_stream_default(index: i64, out: *mut RawStream) -> c_int;
    pub(crate) fn flowhn_stream_from_pool(index: i64, high_priority: c_int, out: *mut RawStream) -> c_int;
    pub(crate) fn flowhn_stream_exchange(stream: RawStream, previous: *mut RawStream) -> c_int;
    pub(crate) fn flowhn_stream_native(stream: RawStream, out: *mut *mut c_void) -> c_int;
    pub(crate) fn flowhn_stream_synchronize(stream: RawStream) -> c_int;
    pub(crate) fn flowhn_stream_query(stream: RawStream, out: *mut c_int) -> c_int;
    pub(crate) fn flowhn_record_stream(tensor: *const C_tensor, stream: RawStream) -> c_int;
    pub(crate) fn flowhn_event_new(timing: c_int, out: *mut *mut c_void) -> c_int;
    pub(crate) fn flowhn_event_free(event: *mut c_void);
    pub(crate) fn flowhn_event_record(event: *mut c_void, stream: RawStream) -> c_int;
    pub(crate) fn flowhn_event_block(event: *mut c_void, stream: RawStream) -> c_int;
    pub(crate) fn flowhn_event_synchronize(event: *mut c_void) -> c_int;
    pub(crate) fn flowhn_event_query(event: *mut c_void, out: *mut c_int) -> c_int;
    pub(crate) fn flowhn_event_elapsed_ms(start: *mut c_void, end: *mut c_void, out: *mut f64) -> c_int;
    pub(crate) fn flowhn_memory_stats(index: i64, out: *mut RawMemory) -> c_int;
    pub(crate) fn flowhn_memory_reset_peak(index: i64) -> c_int;
    pub(crate) fn flowhn_memory_empty_cache() -> c_int;
    pub(crate) fn flowhn_op_call(
        name: *const c_char,
        overload: *const c_char,
        args: *const RawArg,
        n_args: usize,
        sink: *mut c_void,
        push: unsafe extern "C" fn(sink: *mut c_void, tensor: *mut C_tensor),
    ) -> c_int;
    pub(crate) fn flowhn_op_schema(name: *const c_char, overload: *const c_char, out: *mut *mut c_char) -> c_int;
    pub(crate) fn flowhn_flag_set(name: *const c_char, value: c_int) -> c_int;
    pub(crate) fn flowhn_flag_get(name: *const c_char, out: *mut c_int) -> c_int;
    pub(crate) fn flowhn_write_begin(inputs: *const *const C_tensor, n_inputs: usize, target_idx: usize) -> c_int;
    pub(crate) fn flowhn_cpu_elements(tensor: *const C_tensor, data: *mut *const c_void, len: *mut usize) -> c_int;
    #[cfg(feature = "testing")]
    pub(crate) fn flowhn_count_begin(handle: *mut u64) -> c_int;
    #[cfg(feature = "testing")]
    pub(crate) fn flowhn_count_end(handle: u64, flops: *mut u64) -> c_int;
    pub(crate) fn flowhn_torch_lib_dir(out: *mut *mut c_char) -> c_int;
}

#[cfg(flowhn_cuda)]
unsafe extern "C" {
    pub(crate) fn flowhn_graph_new(out: *mut *mut c_void) -> c_int;
    pub(crate) fn flowhn_graph_free(graph: *mut c_void);
    pub(crate) fn flowhn_graph_begin(graph: *mut c_void, pool_a: u64, pool_b: u64, mode: c_int) -> c_int;
    pub(crate) fn flowhn_graph_end(graph: *mut c_void) -> c_int;
    pub(crate) fn flowhn_graph_raw(graph: *mut c_void, out: *mut *mut c_void) -> c_int;
    pub(crate) fn flowhn_graph_instantiate(graph: *mut c_void) -> c_int;
    pub(crate) fn flowhn_graph_replay(graph: *mut c_void) -> c_int;
    pub(crate) fn flowhn_graph_pool(graph: *mut c_void, a: *mut u64, b: *mut u64) -> c_int;
    pub(crate) fn flowhn_cuda_properties(
        index: i64,
        name: *mut c_char,
        capacity: usize,
        n_multiprocessors: *mut i64,
        compute_capability: *mut i64,
        total_bytes: *mut i64,
        shared_bytes: *mut i64,
        pci_bus_id: *mut c_char,
        pci_capacity: usize,
    ) -> c_int;
}

/// rustc links with `--as-needed`: without a reference to a symbol of libtorch_cuda, CUDA would silently be absent at run time.
#[cfg(flowhn_cuda)]
#[used]
static KEEP_LIBTORCH_CUDA: unsafe extern "C" fn(*mut *mut c_void) -> c_int = flowhn_graph_new;

/// A device index as the shim takes it; one that no machine has stays one that no machine has.
pub(crate) fn index(device_idx: usize) -> i64 {
    i64::try_from(device_idx).unwrap_or(i64::MAX)
}

/// Turns a shim status into a result, with the thread's last error as message.
pub(crate) fn status(code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the shim returns a NUL-terminated string that lives until the thread's next shim error; it is copied at once.
    let message = unsafe { CStr::from_ptr(flowhn_last_error()) };
    Err(Error::torch(&message.to_string_lossy()))
}

/// Copies and frees a string that the shim allocated.
///
/// # Safety
/// `text` is a NUL-terminated string from `malloc`, and nobody else frees it.
pub(crate) unsafe fn take_string(text: *mut c_char) -> String {
    // SAFETY: by the contract above.
    unsafe {
        let owned = CStr::from_ptr(text).to_string_lossy().into_owned();
        libc::free(text.cast());
        owned
    }
}
