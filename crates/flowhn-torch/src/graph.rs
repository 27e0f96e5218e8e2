//! CUDA graphs: a step captured once and replayed without the host.

use std::cell::Cell;
use std::ffi::{c_int, c_void};

use crate::kernel::memset::memsets_to_kernels;
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
pub struct Graph {
    handle: *mut c_void,
    n_memsets_replaced: usize,
}

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
        Ok(Self { handle: out, n_memsets_replaced: 0 })
    }

    /// Captures what `step` enqueues on the current stream, which must not be the default one. Small memsets of it become kernels,
    /// which start sooner after one another.
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
        ffi::status(unsafe { ffi::flowhn_graph_begin(self.handle, a, b, mode as c_int) })?;
        let was_capturing = IS_CAPTURING.replace(true);
        let outcome = crate::catch(step);
        IS_CAPTURING.set(was_capturing);
        // SAFETY: as above; a capture that was begun must be ended even if the step failed.
        let ended = ffi::status(unsafe { ffi::flowhn_graph_end(self.handle) });
        let value = outcome?;
        ended?;
        self.n_memsets_replaced = self.instantiate()?;
        Ok(value)
    }

    fn instantiate(&mut self) -> Result<usize> {
        let mut nodes = std::ptr::null_mut();
        // SAFETY: the graph is alive and captured, `&mut` keeps others away; `nodes` is a place for one pointer, to what stays the
        // graph's own.
        unsafe {
            ffi::status(ffi::flowhn_graph_raw(self.handle, &mut nodes))?;
            let n_replaced = memsets_to_kernels(nodes.cast())?;
            ffi::status(ffi::flowhn_graph_instantiate(self.handle))?;
            Ok(n_replaced)
        }
    }

    /// How many memsets of the capture are kernels now.
    pub fn n_memsets_replaced(&self) -> usize {
        self.n_memsets_replaced
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
        ffi::status(unsafe { ffi::flowhn_graph_replay(self.handle) })
    }

    /// The graph's memory pool.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] if nothing was captured.
    pub fn pool(&self) -> Result<GraphPool> {
        let (mut a, mut b) = (0, 0);
        // SAFETY: the graph is alive, both places hold one integer.
        ffi::status(unsafe { ffi::flowhn_graph_pool(self.handle, &mut a, &mut b) })?;
        Ok(GraphPool(a, b))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `flowhn_graph_new`, freed once.
        unsafe { ffi::flowhn_graph_free(self.handle) };
    }
}
