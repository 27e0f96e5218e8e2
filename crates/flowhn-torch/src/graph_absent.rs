//! The graph of a build without CUDA: there is none to make.

use std::convert::Infallible;

use crate::{Error, Result};

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

/// The memory pool of a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GraphPool(Infallible);

/// A captured sequence of kernels. This build cannot make one.
#[derive(Debug)]
pub struct Graph(Infallible);

impl Graph {
    /// An empty graph.
    ///
    /// # Errors
    /// [`Error::Invalid`]: this build has no CUDA.
    pub fn new() -> Result<Self> {
        Err(Error::invalid("graph", "this build has no CUDA: install a CUDA build of PyTorch and rebuild"))
    }

    /// Captures what `step` enqueues on the current stream.
    ///
    /// # Errors
    /// None: there is no graph to call it on.
    pub fn capture<T>(
        &mut self,
        _pool: Option<GraphPool>,
        _mode: CaptureMode,
        _step: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        match self.0 {}
    }

    /// How many memsets of the capture are kernels now.
    pub fn n_memsets_replaced(&self) -> usize {
        match self.0 {}
    }

    /// Whether this thread is inside of [`Graph::capture`], which no thread ever is.
    pub fn is_capturing() -> bool {
        false
    }

    /// Enqueues the captured work on the current stream.
    ///
    /// # Errors
    /// None: there is no graph to call it on.
    pub fn replay(&self) -> Result<()> {
        match self.0 {}
    }

    /// The graph's memory pool.
    ///
    /// # Errors
    /// None: there is no graph to call it on.
    pub fn pool(&self) -> Result<GraphPool> {
        match self.0 {}
    }
}
