//! Ctrl-C, and the signals that ask a process to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use flowhn_torch::exit_now;
use flowhn_train::observe::StopFlag;

use crate::console::Console;
use crate::fail::INTERRUPTED;

/// What the signal handler knows of the run.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    stop: StopFlag,
    training: Arc<AtomicBool>,
}

impl Interrupt {
    /// Installs the handler. The first signal asks a training run to stop after its step; the second, or one that comes before
    /// the first step, ends the process at once.
    ///
    /// # Errors
    /// Where the system refuses.
    pub fn install(console: &Console) -> Result<Self> {
        let interrupt = Self::default();
        let (handler, console) = (interrupt.clone(), console.clone());
        ctrlc::set_handler(move || handler.on_signal(&console)).context("cannot watch for Ctrl-C")?;
        Ok(interrupt)
    }

    /// From here on there is something to save.
    pub fn training_starts(&self) {
        self.training.store(true, Ordering::SeqCst);
    }

    /// The flag that the run looks at.
    pub fn stop_flag(&self) -> &StopFlag {
        &self.stop
    }

    fn on_signal(&self, console: &Console) {
        if !self.training.load(Ordering::SeqCst) {
            console.line("interrupted before the first step; nothing to save");
            exit_now(INTERRUPTED.into());
        }
        if self.stop.is_requested() {
            console.line("killed; --resume goes on from the last checkpoint");
            exit_now(INTERRUPTED.into());
        }
        self.stop.request();
        console.line("interrupted: finishing this step and saving; once more kills at once");
    }
}
