//! Capturing work that has errors of its own.

use crate::{CaptureMode, Error, Graph, GraphPool, Result};

impl Graph {
    /// [`Graph::capture`] for a `step` with errors of its own, which are the inner ones: where it failed, what else went wrong with the
    /// capture follows from that and is not told.
    ///
    /// # Errors
    /// As [`Graph::capture`], where `step` did not fail.
    pub fn try_capture<T, E>(
        &mut self,
        pool: Option<GraphPool>,
        mode: CaptureMode,
        step: impl FnOnce() -> std::result::Result<T, E>,
    ) -> Result<std::result::Result<T, E>> {
        let mut failure = None;
        let captured = self.capture(pool, mode, || Ok(step().map_err(|error| failure = Some(error)).ok()));
        match (failure, captured) {
            (Some(error), _) => Ok(Err(error)),
            (None, Ok(Some(value))) => Ok(Ok(value)),
            (None, Ok(None)) => Err(Error::invalid("capture", "the step was lost")),
            (None, Err(error)) => Err(error),
        }
    }
}
