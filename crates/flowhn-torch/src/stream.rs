//! Streams and events of an accelerator, through libtorch's device-generic interface.

use std::ffi::{c_int, c_void};
use std::marker::PhantomData;

use tch::{Device, Tensor};

use crate::Result;
use crate::ffi::{self, RawStream};

/// A queue of work on one CUDA device. libtorch owns the streams; this is a name for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(RawStream);

impl Stream {
    /// The stream that operators of this thread use on `device_idx`.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] where there is no such device.
    pub fn current(device_idx: usize) -> Result<Self> {
        Self::query(|out| {
            // SAFETY: `out` is a place for one stream.
            unsafe { ffi::flowhn_stream_current(ffi::index(device_idx), out) }
        })
    }

    /// The default stream of `device_idx`.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] where there is no such device.
    pub fn default_of(device_idx: usize) -> Result<Self> {
        Self::query(|out| {
            // SAFETY: `out` is a place for one stream.
            unsafe { ffi::flowhn_stream_default(ffi::index(device_idx), out) }
        })
    }

    /// A stream of libtorch's pool for `device_idx`.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] where there is no such device.
    pub fn from_pool(device_idx: usize, priority: Priority) -> Result<Self> {
        Self::query(|out| {
            // SAFETY: `out` is a place for one stream.
            unsafe {
                ffi::flowhn_stream_from_pool(ffi::index(device_idx), c_int::from(priority == Priority::High), out)
            }
        })
    }

    /// Makes this the current stream of the calling thread until the guard is dropped.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] if the stream's device is gone.
    pub fn enter(self) -> Result<StreamGuard> {
        // SAFETY: `out` is a place for one stream.
        let previous = Self::query(|out| unsafe { ffi::flowhn_stream_exchange(self.0, out) })?;
        Ok(StreamGuard { previous, _not_send: PhantomData })
    }

    /// Waits on the host until all work of the stream is done.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] with the first error of the work that ran.
    pub fn synchronize(self) -> Result<()> {
        // SAFETY: plain values cross the border.
        ffi::status(unsafe { ffi::flowhn_stream_synchronize(self.0) })
    }

    /// Whether all work of the stream is done.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] with the first error of the work that ran.
    pub fn is_idle(self) -> Result<bool> {
        let mut idle = 0;
        // SAFETY: `idle` is a place for one int.
        ffi::status(unsafe { ffi::flowhn_stream_query(self.0, &mut idle) })?;
        Ok(idle != 0)
    }

    /// Makes later work of this stream wait for `event`.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] if the event belongs to another kind of device.
    pub fn wait(self, event: &Event) -> Result<()> {
        // SAFETY: the event lives as long as `event`.
        ffi::status(unsafe { ffi::flowhn_event_block(event.0, self.0) })
    }

    /// The `cudaStream_t`, for libraries that launch kernels themselves. It stays libtorch's.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] where the backend has no native handle.
    pub fn native_handle(self) -> Result<*mut c_void> {
        let mut out = std::ptr::null_mut();
        // SAFETY: `out` is a place for one pointer.
        ffi::status(unsafe { ffi::flowhn_stream_native(self.0, &mut out) })?;
        Ok(out)
    }

    fn query(fill: impl FnOnce(*mut RawStream) -> c_int) -> Result<Self> {
        let mut raw = RawStream { id: 0, device_index: 0, device_type: 0 };
        ffi::status(fill(&mut raw))?;
        Ok(Self(raw))
    }
}

/// How urgently the device serves a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// As the default stream.
    Normal,
    /// Before normal streams.
    High,
}

/// Restores the thread's previous stream when dropped.
#[derive(Debug)]
#[must_use = "the stream is current only while the guard lives"]
pub struct StreamGuard {
    previous: Stream,
    /// The current stream is a property of the thread.
    _not_send: PhantomData<*const ()>,
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        let mut ignored = self.previous.0;
        // SAFETY: plain values cross the border. A failure means that the device is gone, which the next operator reports.
        unsafe { ffi::flowhn_stream_exchange(self.previous.0, &mut ignored) };
    }
}

/// Tells the allocator that `tensor` is also used on `stream`, so that its memory is not reused before that work is done.
///
/// # Errors
/// [`crate::Error::Torch`] if the tensor is not on the stream's kind of device.
pub fn record_stream(tensor: &Tensor, stream: Stream) -> Result<()> {
    // SAFETY: the tensor outlives the call.
    ffi::status(unsafe { ffi::flowhn_record_stream(tensor.as_ptr(), stream.0) })
}

/// Runs two pieces of work that do not depend on each other: `beside` on the stream `side`, `here` on the current one. Both begin after
/// all that the current stream was given before, and what it is given afterwards waits for both.
///
/// Tensors that one of them makes and the other stream uses later have to be recorded by [`record_stream`].
///
/// # Errors
/// Those of the two; [`crate::Error::Torch`] if the streams cannot wait for each other.
pub fn fork_join<A, B, E: From<crate::Error>>(
    device_idx: usize,
    side: Stream,
    beside: impl FnOnce() -> std::result::Result<A, E>,
    here: impl FnOnce() -> std::result::Result<B, E>,
) -> std::result::Result<(A, B), E> {
    let current = Stream::current(device_idx)?;
    let mut begin = Event::new(false)?;
    begin.record(current)?;
    side.wait(&begin)?;
    let first = {
        let _guard = side.enter()?;
        beside()
    };
    let second = here();
    // Also after a failure: work that was begun on the side has to end before its memory is used again.
    let mut end = Event::new(false)?;
    end.record(side)?;
    current.wait(&end)?;
    Ok((first?, second?))
}

/// A stream of a GPU that takes all work of the thread until dropped: the default one cannot be captured.
#[derive(Debug)]
pub struct SideStream {
    stream: Stream,
    _guard: StreamGuard,
}

impl SideStream {
    /// Enters a stream, after the work that is under way; there is none on the CPU.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] with the first error of that work.
    pub fn enter(device: Device) -> Result<Option<Self>> {
        let Device::Cuda(device_idx) = device else { return Ok(None) };
        Stream::current(device_idx)?.synchronize()?;
        let stream = Stream::from_pool(device_idx, Priority::Normal)?;
        Ok(Some(Self { stream, _guard: stream.enter()? }))
    }

    /// The stream.
    pub fn stream(&self) -> Stream {
        self.stream
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        // Later work, in another stream, finds everything done. An error of the work itself shows there again.
        let _ = self.stream.synchronize();
    }
}

/// A mark in a stream.
#[derive(Debug)]
pub struct Event(*mut c_void);

// SAFETY: c10::Event has no thread affinity; `&self` methods only query or wait.
unsafe impl Send for Event {}

impl Event {
    /// A new event; with `timing` it can measure, without it is cheaper.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] where there is no CUDA.
    pub fn new(timing: bool) -> Result<Self> {
        let mut out = std::ptr::null_mut();
        // SAFETY: `out` is a place for one pointer, owned by the value made here.
        ffi::status(unsafe { ffi::flowhn_event_new(c_int::from(timing), &mut out) })?;
        Ok(Self(out))
    }

    /// Marks the present end of `stream`.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] if the stream is on another device than earlier records.
    pub fn record(&mut self, stream: Stream) -> Result<()> {
        // SAFETY: the event is alive, `&mut` keeps others away.
        ffi::status(unsafe { ffi::flowhn_event_record(self.0, stream.0) })
    }

    /// Waits on the host until the mark is reached.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] with the first error of the work before it.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the event is alive.
        ffi::status(unsafe { ffi::flowhn_event_synchronize(self.0) })
    }

    /// Whether the mark is reached.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] with the first error of the work before it.
    pub fn is_done(&self) -> Result<bool> {
        let mut done = 0;
        // SAFETY: the event is alive, `done` a place for one int.
        ffi::status(unsafe { ffi::flowhn_event_query(self.0, &mut done) })?;
        Ok(done != 0)
    }

    /// Milliseconds on the device between this mark and `end`; both need timing and must be reached.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] if either was made without timing or is not reached.
    pub fn elapsed_ms(&self, end: &Self) -> Result<f64> {
        let mut out = 0.;
        // SAFETY: both events are alive, `out` is a place for one double.
        ffi::status(unsafe { ffi::flowhn_event_elapsed_ms(self.0, end.0, &mut out) })?;
        Ok(out)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `flowhn_event_new`, freed once.
        unsafe { ffi::flowhn_event_free(self.0) };
    }
}
