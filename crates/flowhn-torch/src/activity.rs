//! What a GPU works on and when, launch by launch, as NVIDIA's library CUPTI records it.
//!
//! libtorch brings the library and has loaded it. Nothing is recorded until somebody holds an [`Activity`].

use std::alloc::Layout;
use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::{Error, Result};

/// The name under which libtorch asks for the library.
const LIBRARY: &str = "libcupti.so.13";
/// Bytes of a buffer that the library fills: some 40,000 records.
const BUFFER: Layout = match Layout::from_size_align(8 << 20, 8) {
    Ok(layout) => layout,
    Err(_) => panic!("8 is a power of two"),
};
/// What it answers when all went well.
const SUCCESS: u32 = 0;
/// Hand over what is finished, buffers that are not full as well.
const FLUSH_ALL: u32 = 1;

const MEMCPY: u32 = 1;
const MEMSET: u32 = 2;
/// Kernels, without forbidding them to overlap.
const CONCURRENT_KERNEL: u32 = 10;
const KINDS: [u32; 3] = [CONCURRENT_KERNEL, MEMCPY, MEMSET];

static IS_ACTIVE: AtomicBool = AtomicBool::new(false);
static RECORDS: Mutex<Vec<Record>> = Mutex::new(Vec::new());

/// While it lives, what the devices of this process do is recorded. There is one at a time.
#[derive(Debug)]
pub struct Activity(&'static Cupti);

/// A kernel, copy or memset on a device. Times are the device's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The kernel's symbol, or `memcpy` or `memset`.
    pub name: String,
    /// Nanoseconds, as those of other records.
    pub start_ns: u64,
    /// As `start_ns`.
    pub end_ns: u64,
}

impl Activity {
    /// Starts to record. A CUDA graph that is to be seen inside is best captured afterwards.
    ///
    /// # Errors
    /// [`Error::Invalid`] if somebody else records; [`Error::Kernel`] if there is no CUPTI or it refuses, as it does for users without
    /// the permission to profile.
    pub fn start() -> Result<Self> {
        let cupti = Cupti::get()?;
        if IS_ACTIVE.swap(true, Ordering::AcqRel) {
            return Err(Error::invalid("activity", "another one records already; there is one at a time"));
        }
        let activity = Self(cupti);
        // SAFETY: a number that CUPTI has for a kind of records.
        KINDS.iter().try_for_each(|&kind| cupti.check("cuptiActivityEnable", unsafe { (cupti.enable)(kind) }))?;
        Ok(activity)
    }

    /// What was recorded since the last call, in the order of its begin. The devices have to be idle: what is under way may be missing.
    ///
    /// # Errors
    /// [`Error::Kernel`] if CUPTI refuses.
    pub fn take(&self) -> Result<Vec<Record>> {
        self.0.flush()?;
        let mut records = std::mem::take(&mut *locked());
        records.sort_by_key(|record| (record.start_ns, record.end_ns));
        Ok(records)
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        for kind in KINDS {
            // What CUPTI answers changes nothing here.
            // SAFETY: as in `start`.
            let _ = unsafe { (self.0.disable)(kind) };
        }
        // What it still holds is not for the next one.
        let _ = self.0.flush();
        locked().clear();
        IS_ACTIVE.store(false, Ordering::Release);
    }
}

/// How a device fills the time from the first begin of its records to their last end, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Occupation {
    /// All of it.
    pub all_ns: u64,
    /// That in which something ran.
    pub busy_ns: u64,
    /// How often nothing ran.
    pub n_gaps: u64,
}

impl Occupation {
    /// Of records in order of their begin.
    pub fn of(records: &[Record]) -> Self {
        let Some(first) = records.first() else { return Self::default() };
        let (mut found, mut end_ns) = (Self::default(), first.start_ns);
        for record in records {
            found.n_gaps += u64::from(record.start_ns > end_ns);
            found.busy_ns += record.end_ns.saturating_sub(record.start_ns.max(end_ns));
            end_ns = end_ns.max(record.end_ns);
        }
        Self { all_ns: end_ns - first.start_ns, ..found }
    }
}

type OnRequest = unsafe extern "C" fn(buffer: *mut *mut u8, size: *mut usize, max_records: *mut usize);
type OnComplete = unsafe extern "C" fn(context: *mut c_void, stream: u32, buffer: *mut u8, size: usize, n_valid: usize);

/// The functions of CUPTI that are called here, by the signatures of its header `cupti_activity.h`.
struct Cupti {
    enable: unsafe extern "C" fn(kind: u32) -> u32,
    disable: unsafe extern "C" fn(kind: u32) -> u32,
    flush_all: unsafe extern "C" fn(flag: u32) -> u32,
    next_record: unsafe extern "C" fn(buffer: *mut u8, n_valid: usize, record: *mut *mut c_void) -> u32,
    result_string: unsafe extern "C" fn(result: u32, text: *mut *const c_char) -> u32,
}

impl std::fmt::Debug for Cupti {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cupti")
    }
}

impl Cupti {
    /// The library with its callbacks set, opened once.
    fn get() -> Result<&'static Self> {
        static CUPTI: OnceLock<std::result::Result<Cupti, String>> = OnceLock::new();
        CUPTI.get_or_init(Self::open).as_ref().map_err(|message| failed(message.clone()))
    }

    fn open() -> std::result::Result<Self, String> {
        let text = |error: libloading::Error| error.to_string();
        // SAFETY: libtorch has loaded this library; where it has not, its initialisers are those of a library that libtorch may load.
        let library = unsafe { Library::open(Some(LIBRARY), RTLD_NOW | RTLD_LOCAL) }.map_err(text)?;
        // SAFETY: the types are those of CUPTI's header. The library is never closed.
        let (cupti, register) = unsafe {
            let cupti = Self {
                enable: *library.get(b"cuptiActivityEnable\0").map_err(text)?,
                disable: *library.get(b"cuptiActivityDisable\0").map_err(text)?,
                flush_all: *library.get(b"cuptiActivityFlushAll\0").map_err(text)?,
                next_record: *library.get(b"cuptiActivityGetNextRecord\0").map_err(text)?,
                result_string: *library.get(b"cuptiGetResultString\0").map_err(text)?,
            };
            let register: unsafe extern "C" fn(OnRequest, OnComplete) -> u32 =
                *library.get(b"cuptiActivityRegisterCallbacks\0").map_err(text)?;
            (cupti, register)
        };
        std::mem::forget(library);
        // SAFETY: both functions live as long as the process.
        let outcome = unsafe { register(on_request, on_complete) };
        cupti.check("cuptiActivityRegisterCallbacks", outcome).map_err(|error| error.to_string())?;
        Ok(cupti)
    }

    /// Has CUPTI hand over what it holds.
    fn flush(&self) -> Result<()> {
        // SAFETY: a flag that CUPTI has; the callbacks it comes back through are those of this module.
        self.check("cuptiActivityFlushAll", unsafe { (self.flush_all)(FLUSH_ALL) })
    }

    fn check(&self, what: &str, outcome: u32) -> Result<()> {
        if outcome == SUCCESS {
            return Ok(());
        }
        let mut text = std::ptr::null();
        // SAFETY: `text` is a place for one pointer, which leads to a constant of the library's or stays null.
        let text = unsafe {
            let _ = (self.result_string)(outcome, &mut text);
            if text.is_null() { c"unknown" } else { CStr::from_ptr(text) }
        };
        Err(failed(format!("{what}: {} ({outcome})", text.to_string_lossy())))
    }
}

fn failed(message: String) -> Error {
    Error::Kernel { kernel: "CUPTI".to_owned(), message }
}

/// The value, also after a panic elsewhere: a list is whole at any moment.
fn locked() -> MutexGuard<'static, Vec<Record>> {
    RECORDS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What all records of the three kinds begin with: `CUpti_ActivityKernel10`, `CUpti_ActivityMemcpy6`, `CUpti_ActivityMemset4` and their
/// successors, which only grow at their ends.
#[repr(C)]
struct Head {
    kind: u32,
    of_its_kind: [u32; 3],
    start_ns: u64,
    end_ns: u64,
}

/// Where the record of a kernel has the pointer to its name.
const NAME_AT: usize = 104;

/// Gives CUPTI a buffer; null, if there is no memory, makes it drop records.
unsafe extern "C" fn on_request(buffer: *mut *mut u8, size: *mut usize, max_records: *mut usize) {
    // SAFETY: the layout is not empty; CUPTI hands places for three values.
    unsafe {
        *buffer = std::alloc::alloc(BUFFER);
        *size = if (*buffer).is_null() { 0 } else { BUFFER.size() };
        *max_records = 0;
    }
}

/// Reads a buffer that CUPTI gives back.
unsafe extern "C" fn on_complete(_: *mut c_void, _: u32, buffer: *mut u8, _: usize, n_valid: usize) {
    if buffer.is_null() {
        return;
    }
    if let Ok(cupti) = Cupti::get() {
        let mut records = locked();
        let mut at = std::ptr::null_mut();
        // SAFETY: the buffer is CUPTI's as it filled it; each record it names is whole and stays until the buffer is freed below.
        unsafe {
            while (cupti.next_record)(buffer, n_valid, &mut at) == SUCCESS {
                records.extend(read(at.cast()));
            }
        }
    }
    // SAFETY: CUPTI got it from `on_request` and hands it back once.
    unsafe { std::alloc::dealloc(buffer, BUFFER) };
}

/// A record of one of the three kinds whose times are known.
///
/// # Safety
/// `at` leads to a record of CUPTI's.
unsafe fn read(at: *const u8) -> Option<Record> {
    // SAFETY: every record begins with its kind.
    let kind = unsafe { at.cast::<u32>().read_unaligned() };
    let name = match kind {
        MEMCPY => "memcpy".to_owned(),
        MEMSET => "memset".to_owned(),
        CONCURRENT_KERNEL => {
            // SAFETY: a kernel's record has a pointer there, to a C string or null.
            let name = unsafe { at.add(NAME_AT).cast::<*const c_char>().read_unaligned() };
            // SAFETY: as above; CUPTI keeps names as long as their module is loaded.
            if name.is_null() { String::new() } else { unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned() }
        }
        _ => return None,
    };
    // SAFETY: records of these kinds begin so.
    let head = unsafe { at.cast::<Head>().read_unaligned() };
    let Head { start_ns, end_ns, .. } = head;
    (0 < start_ns && start_ns <= end_ns).then_some(Record { name, start_ns, end_ns })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(start_ns: u64, end_ns: u64) -> Record {
        Record { name: String::new(), start_ns, end_ns }
    }

    #[test]
    fn time_in_which_several_run_counts_once() {
        assert_eq!(Occupation::of(&[]), Occupation::default());
        assert_eq!(Occupation::of(&[record(5, 9)]), Occupation { all_ns: 4, busy_ns: 4, n_gaps: 0 });
        // One beside another, one inside another, a gap, one that touches.
        let records = [record(0, 10), record(4, 14), record(5, 6), record(20, 30), record(30, 31)];
        assert_eq!(Occupation::of(&records), Occupation { all_ns: 31, busy_ns: 25, n_gaps: 1 });
    }

    #[test]
    fn a_kernel_is_read_from_its_record() {
        let mut bytes = [0u8; 112];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &CONCURRENT_KERNEL.to_ne_bytes());
        put(16, &70u64.to_ne_bytes());
        put(24, &90u64.to_ne_bytes());
        put(NAME_AT, &(c"any_kernel".as_ptr() as usize).to_ne_bytes());
        // SAFETY: the bytes are laid out as CUPTI's.
        let read_of = |bytes: &[u8]| unsafe { read(bytes.as_ptr()) };
        let want = Record { name: "any_kernel".to_owned(), start_ns: 70, end_ns: 90 };
        assert_eq!(read_of(&bytes), Some(want));
        bytes[..4].copy_from_slice(&MEMSET.to_ne_bytes());
        assert_eq!(read_of(&bytes).map(|record| record.name), Some("memset".to_owned()));
        bytes[..4].copy_from_slice(&99u32.to_ne_bytes());
        assert_eq!(read_of(&bytes), None, "another kind");
        bytes[..4].copy_from_slice(&MEMSET.to_ne_bytes());
        bytes[24..32].fill(0);
        assert_eq!(read_of(&bytes), None, "not ended");
    }

    #[test]
    fn buffers_go_back_to_where_they_came_from() {
        let (mut buffer, mut size, mut max_records) = (std::ptr::null_mut(), 0, 1);
        // SAFETY: three places; then the buffer as it was handed out, of which nothing is valid.
        unsafe {
            on_request(&mut buffer, &mut size, &mut max_records);
            assert!(!buffer.is_null() && size == BUFFER.size() && max_records == 0);
            on_complete(std::ptr::null_mut(), 0, buffer, size, 0);
        }
    }
}
