//! How a run is watched and stopped.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::metrics::{StepRecord, ValidRecord};
use crate::{Error, data};

/// Something happened in a run.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The data path is at work.
    Data(&'a data::Event<'a>),
    /// A checkpoint was not usable, and an earlier one is taken.
    Skipped(&'a Error),
    /// The run goes on.
    Resumed {
        /// The checkpoint; `None` where the run was stopped before its first.
        checkpoint: Option<&'a Path>,
        /// Steps done.
        step: u64,
    },
    /// Something that works and should be known, as a sentence.
    Warning(String),
    /// A step was handed to the device.
    Step {
        /// Steps done.
        step: u64,
        /// Steps of the whole run.
        steps: u64,
    },
    /// Losses were read from the device and logged, in order.
    Logged(&'a [StepRecord]),
    /// A validation starts.
    Validating {
        /// Steps done.
        step: u64,
    },
    /// A validation was logged.
    Validated(&'a ValidRecord),
    /// A checkpoint is durable.
    Saved {
        /// Its directory.
        path: &'a Path,
        /// Older ones that were removed after it.
        removed: &'a [PathBuf],
    },
}

/// Watches a run. `()` looks away; a closure over [`Event`] is an observer too.
pub trait Observer: Send {
    /// Called on the thread that trains, or while data is prepared on one that tokenises.
    fn event(&mut self, event: Event<'_>);
}

impl Observer for () {
    fn event(&mut self, _event: Event<'_>) {}
}

impl<F: FnMut(Event<'_>) + Send> Observer for F {
    fn event(&mut self, event: Event<'_>) {
        self(event);
    }
}

/// A request to stop, shared with a signal handler: the run finishes its step, saves, and returns.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Asks the run to stop after its step.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked to.
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
