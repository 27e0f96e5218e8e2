//! What a CUDA device has, and what libtorch's caching allocator has taken of it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

#[cfg(any(not(flowhn_cuda), doc))]
use crate::Error;
use crate::Result;
use crate::ffi::{self, RawMemory};

/// Bytes that libtorch's caching allocator holds on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryStats {
    /// Bytes of living tensors.
    pub allocated_bytes: u64,
    /// Most bytes of living tensors since the last [`MemoryStats::reset_peak`].
    pub allocated_peak_bytes: u64,
    /// Bytes taken from the driver, living tensors and cache together.
    pub reserved_bytes: u64,
    /// Most bytes taken from the driver since the last reset.
    pub reserved_peak_bytes: u64,
    /// How often an allocation failed for good.
    pub n_ooms: u64,
    /// How often an allocation succeeded only after the cache was emptied.
    pub n_alloc_retries: u64,
    /// Free bytes of the device.
    pub free_bytes: u64,
    /// All bytes of the device.
    pub total_bytes: u64,
}

impl MemoryStats {
    /// The numbers of `device_idx`, now.
    ///
    /// # Errors
    /// [`Error::Torch`] where there is no such device.
    pub fn of(device_idx: usize) -> Result<Self> {
        let mut raw = RawMemory::default();
        // SAFETY: `raw` is a place for the struct the shim fills.
        ffi::status(unsafe { ffi::flowhn_memory_stats(ffi::index(device_idx), &mut raw) })?;
        let bytes = |value: i64| u64::try_from(value).unwrap_or(0);
        Ok(Self {
            allocated_bytes: bytes(raw.allocated),
            allocated_peak_bytes: bytes(raw.allocated_peak),
            reserved_bytes: bytes(raw.reserved),
            reserved_peak_bytes: bytes(raw.reserved_peak),
            n_ooms: bytes(raw.n_ooms),
            n_alloc_retries: bytes(raw.n_alloc_retries),
            free_bytes: bytes(raw.free),
            total_bytes: bytes(raw.total),
        })
    }

    /// Starts the peaks of `device_idx` anew.
    ///
    /// # Errors
    /// [`Error::Torch`] where there is no such device.
    pub fn reset_peak(device_idx: usize) -> Result<()> {
        // SAFETY: plain values cross the border.
        ffi::status(unsafe { ffi::flowhn_memory_reset_peak(ffi::index(device_idx)) })
    }

    /// Gives cached memory back to the driver.
    ///
    /// # Errors
    /// [`Error::Torch`] where there is no CUDA.
    pub fn empty_cache() -> Result<()> {
        // SAFETY: nothing crosses the border.
        ffi::status(unsafe { ffi::flowhn_memory_empty_cache() })
    }
}

/// Keeps freed host memory in the process instead of giving it back to the system, where the allocator is glibc's.
///
/// A training step frees and allocates the same large tensors over and over. By default each of them is mapped, zeroed page by page
/// by the kernel, and unmapped again, which costs more than many an operator. Call it once, early, in a program that trains.
pub fn keep_freed_host_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets parameters of the allocator and is safe to call at any time; an unknown one is ignored.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}

/// What one CUDA device is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceProperties {
    /// The product's name.
    pub name: String,
    /// Number of streaming multiprocessors.
    pub n_multiprocessors: u32,
    /// Compute capability, ten times major plus minor: 90 for an H100.
    pub compute_capability: u32,
    /// All bytes of device memory.
    pub total_bytes: u64,
    /// Shared memory that one block may opt in to, in bytes.
    pub shared_bytes_per_block: u64,
    /// Domain, bus, device and function, in hexadecimal: `00000000:19:00.0`. Other libraries number devices differently.
    pub pci_bus_id: String,
}

impl DeviceProperties {
    /// The properties of `device_idx`. A device is asked once: launches read them every time.
    ///
    /// # Errors
    /// [`Error::Invalid`] in a build without CUDA, [`Error::Torch`] where there is no such device.
    pub fn of(device_idx: usize) -> Result<&'static Self> {
        static KNOWN: Mutex<BTreeMap<usize, &'static DeviceProperties>> = Mutex::new(BTreeMap::new());
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&properties) = known.get(&device_idx) {
            return Ok(properties);
        }
        let properties: &'static Self = Box::leak(Box::new(Self::ask(device_idx)?));
        known.insert(device_idx, properties);
        Ok(properties)
    }

    #[cfg(flowhn_cuda)]
    fn ask(device_idx: usize) -> Result<Self> {
        let mut name = [0 as std::ffi::c_char; 256];
        let mut pci_bus_id = [0 as std::ffi::c_char; 32];
        let (mut n_multiprocessors, mut capability, mut total, mut shared) = (0, 0, 0, 0);
        // SAFETY: each pointer is a place for what the shim writes; the name's buffer is zeroed and one byte longer than what
        // the shim copies, so it ends in NUL, and the shim ends the other text itself.
        let (name, pci_bus_id) = unsafe {
            ffi::status(ffi::flowhn_cuda_properties(
                ffi::index(device_idx),
                name.as_mut_ptr(),
                name.len(),
                &mut n_multiprocessors,
                &mut capability,
                &mut total,
                &mut shared,
                pci_bus_id.as_mut_ptr(),
                pci_bus_id.len(),
            ))?;
            (std::ffi::CStr::from_ptr(name.as_ptr()), std::ffi::CStr::from_ptr(pci_bus_id.as_ptr()))
        };
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            n_multiprocessors: n_multiprocessors as u32,
            compute_capability: capability as u32,
            total_bytes: total as u64,
            shared_bytes_per_block: shared as u64,
            pci_bus_id: pci_bus_id.to_string_lossy().into_owned(),
        })
    }

    #[cfg(not(flowhn_cuda))]
    fn ask(_device_idx: usize) -> Result<Self> {
        Err(Error::invalid("device_properties", "this build has no CUDA: install a CUDA build of PyTorch and rebuild"))
    }
}
