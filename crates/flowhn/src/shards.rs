//! The making of token shards, as it is shown.

use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use flowhn_train::data::{Event, Progress};
use indicatif::ProgressBar;

use crate::console::Console;
use crate::units::{bytes, grouped};

const TEMPLATE: &str = "tokenising {msg} [{bar:28}] {bytes}/{total_bytes}  ETA {eta}";
/// Between lines where there is no bar.
const PAUSE: Duration = Duration::from_secs(10);

/// Shows the events of the data path. The bar goes when this is dropped.
pub struct ShardProgress {
    console: Console,
    state: Mutex<State>,
}

struct State {
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl ShardProgress {
    /// Nothing is shown before the first event.
    pub fn new(console: &Console) -> Self {
        Self { console: console.clone(), state: Mutex::new(State { bar: None, last_line: Instant::now() }) }
    }

    fn tokenizing(&self, state: &mut State, source: &Path, read: u64, total: u64) {
        let bar = state.bar.take().or_else(|| self.console.bar(total, TEMPLATE));
        match bar {
            Some(bar) => {
                bar.set_message(source.file_name().unwrap_or_default().to_string_lossy().into_owned());
                bar.set_length(total);
                bar.set_position(read);
                state.bar = Some(bar);
            }
            None if state.last_line.elapsed() > PAUSE => {
                let percent = 100. * read as f64 / total.max(1) as f64;
                self.console.line(format_args!("tokenising {}: {percent:.0} %", source.display()));
                state.last_line = Instant::now();
            }
            None => {}
        }
    }
}

impl Progress for ShardProgress {
    fn report(&self, event: &Event<'_>) {
        let Ok(mut state) = self.state.lock() else { return };
        match event {
            Event::Waiting { source } => {
                self.console.line(format_args!("waiting for another process that tokenises {}", source.display()));
            }
            Event::Rebuilding { source, reason, .. } => {
                self.console.warn(format_args!("the token shard of {} is built again: {reason}", source.display()));
            }
            Event::Tokenizing { source, bytes_read, bytes_total, .. } => {
                self.tokenizing(&mut state, source, *bytes_read, *bytes_total);
            }
            Event::Built { source, n_documents, n_tokens, n_empty, text_bytes, .. } => {
                state.clear();
                let empty =
                    if *n_empty > 0 { format!(", {} empty ones left out", grouped(*n_empty)) } else { String::new() };
                self.console.line(format_args!(
                    "tokenised {}: {} documents{empty}, {} of text, {} tokens",
                    source.display(),
                    grouped(*n_documents),
                    bytes(*text_bytes),
                    grouped(*n_tokens),
                ));
            }
            // A shard that is there already is no news.
            _ => {}
        }
    }
}

impl State {
    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for ShardProgress {
    fn drop(&mut self) {
        if let Ok(mut state) = self.state.lock() {
            state.clear();
        }
    }
}
