//! CUDA graphs: a step captured once and replayed without the host.

use std::cell::Cell;
use std::ffi::{c_int, c_void};

use crate::{Result, ffi};

/// Which other work of the process makes a capture fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaptureMode {
    /// Unsafe calls of any thread.
    Global,
    /// Unsafe calls of the capturing thread.
    ThreadLocal,
    /// None.
    Relaxed,
}

/// The memory pool of a graph, to be shared with graphs that never run at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GraphPool(u64, u64);

thread_local! {
    static IS_CAPTURING: Cell<bool> = const { Cell::new(false) };
}

/// A captured sequence of kernels.
#[derive(Debug)]
pub struct Graph(*mut c_void);

// SAFETY: a CUDAGraph has no thread affinity; `&self` methods only replay, which CUDA serialises per stream.
unsafe impl Send for Graph {}

impl Graph {
    /// An empty graph.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] where there is no CUDA.
    pub fn new() -> Result<Self> {
        let mut out = std::ptr::null_mut();
        // SAFETY: `out` is a place for one pointer, owned by the value made here.
        ffi::status(unsafe { ffi::flowhn_graph_new(&mut out) })?;
        Ok(Self(out))
    }

    /// Captures what `step` enqueues on the current stream, which must not be the default one.
    ///
    /// # Errors
    /// Those of `step`; [`crate::Error::Torch`] if the work cannot be captured. The capture is ended in either case.
    pub fn capture<T>(
        &mut self,
        pool: Option<GraphPool>,
        mode: CaptureMode,
        step: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let GraphPool(a, b) = pool.unwrap_or(GraphPool(0, 0));
        let mode = match mode {
            CaptureMode::Global => 0,
            CaptureMode::ThreadLocal => 1,
            CaptureMode::Relaxed => 2,
        };
        // SAFETY: the graph is alive, `&mut` keeps others away.
        ffi::status(unsafe { ffi::flowhn_graph_begin(self.0, a, b, mode as c_int) })?;
        let was_capturing = IS_CAPTURING.replace(true);
        let outcome = crate::catch(step);
        IS_CAPTURING.set(was_capturing);
        // SAFETY: as above; a capture that was begun must be ended even if the step failed.
        let ended = ffi::status(unsafe { ffi::flowhn_graph_end(self.0) });
        let value = outcome?;
        ended?;
        Ok(value)
    }

    /// Whether this thread is inside of [`Graph::capture`]: what it enqueues is written down and not done.
    pub fn is_capturing() -> bool {
        IS_CAPTURING.get()
    }

    /// Enqueues the captured work on the current stream.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] if nothing was captured or the launch fails.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: the graph is alive.
        ffi::status(unsafe { ffi::flowhn_graph_replay(self.0) })
    }

    /// The graph's memory pool.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] if nothing was captured.
    pub fn pool(&self) -> Result<GraphPool> {
        let (mut a, mut b) = (0, 0);
        // SAFETY: the graph is alive, both places hold one integer.
        ffi::status(unsafe { ffi::flowhn_graph_pool(self.0, &mut a, &mut b) })?;
        Ok(GraphPool(a, b))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `flowhn_graph_new`, freed once.
        unsafe { ffi::flowhn_graph_free(self.0) };
    }
}
