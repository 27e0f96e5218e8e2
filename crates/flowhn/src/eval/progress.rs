//! How far an evaluation has come, as it is shown.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use crate::console::Console;
use crate::units::grouped;

/// Between lines where there is no bar.
const PAUSE: Duration = Duration::from_secs(10);

/// A bar, or lines now and then where there is no terminal. It goes when this is dropped.
pub struct EvalProgress {
    console: Console,
    /// What is counted.
    unit: &'static str,
    bar: Option<ProgressBar>,
    last_line: Instant,
    has_begun: bool,
}

impl EvalProgress {
    /// Nothing is shown before the first report.
    pub fn new(console: &Console, unit: &'static str) -> Self {
        Self { console: console.clone(), unit, bar: None, last_line: Instant::now(), has_begun: false }
    }

    /// `done` of `all` are; what the first report names was known already.
    pub fn report(&mut self, done: u64, all: u64) {
        if !self.has_begun {
            self.has_begun = true;
            self.bar = self.console.bar(all, "scoring {pos}/{len} {msg} [{bar:28}]  ETA {eta}");
            if let Some(bar) = &self.bar {
                bar.set_message(self.unit);
                // What was known already must not count as if it had been scored just now.
                bar.set_position(done);
                bar.reset_eta();
            }
        }
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if self.last_line.elapsed() > PAUSE => {
                self.console.line(format_args!("scored {} of {} {}", grouped(done), grouped(all), self.unit));
                self.last_line = Instant::now();
            }
            None => {}
        }
    }
}

impl Drop for EvalProgress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
