//! Standard output for results, standard error for everything else.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// Whoever read our standard output has stopped.
#[derive(Debug)]
pub struct StdoutClosed;

impl fmt::Display for StdoutClosed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("standard output was closed")
    }
}

impl std::error::Error for StdoutClosed {}

/// Writes text to standard output and flushes it.
///
/// # Errors
/// [`StdoutClosed`] where nobody reads any more, else what the system says.
pub fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(StdoutClosed.into()),
        other => other.context("cannot write to standard output"),
    }
}

/// Writes one JSON value and a newline to standard output.
///
/// # Errors
/// As [`print()`].
pub fn print_json(value: &impl Serialize) -> Result<()> {
    print(&format!("{}\n", serde_json::to_string(value)?))
}

/// Standard error: lines, and progress bars where it is a terminal. Clones share it.
#[derive(Clone, Debug)]
pub struct Console {
    bars: Option<MultiProgress>,
}

impl Console {
    /// Looks whether standard error is a terminal.
    pub fn new() -> Self {
        let bars = io::stderr().is_terminal();
        Self { bars: bars.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(8))) }
    }

    /// Whether there is no terminal to draw bars on.
    pub fn is_plain(&self) -> bool {
        self.bars.is_none()
    }

    /// Writes a line, above the bars. A standard error that is closed must not stop a run.
    pub fn line(&self, text: impl fmt::Display) {
        match &self.bars {
            Some(bars) => bars.suspend(|| {
                let _ = writeln!(io::stderr(), "{text}");
            }),
            None => {
                let _ = writeln!(io::stderr(), "{text}");
            }
        }
    }

    /// Writes a line that begins with `warning:`.
    pub fn warn(&self, text: impl fmt::Display) {
        self.line(format_args!("warning: {text}"));
    }

    /// A new bar of `len` units below the others, drawn by an indicatif template; `None` without a terminal.
    pub fn bar(&self, len: u64, template: &str) -> Option<ProgressBar> {
        let bars = self.bars.as_ref()?;
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = bars.add(ProgressBar::new(len).with_style(style.progress_chars("=> ")));
        bar.enable_steady_tick(Duration::from_millis(500));
        Some(bar)
    }
}
