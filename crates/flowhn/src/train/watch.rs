//! A run as it is shown: a bar on a terminal, a line now and then elsewhere.

use std::time::{Duration, Instant};

use flowhn_train::RunConfig;
use flowhn_train::data::Progress;
use flowhn_train::metrics::{StepRecord, ValidRecord};
use flowhn_train::observe::{Event, Observer};
use indicatif::ProgressBar;

use crate::console::Console;
use crate::shards::ShardProgress;
use crate::units::{grouped, seconds};

const TEMPLATE: &str = "step {pos}/{len} [{bar:28}] {msg}  ETA {eta}";
/// Between lines where there is no bar.
const PAUSE: Duration = Duration::from_secs(10);

/// Shows the events of a run.
pub struct Watch {
    console: Console,
    shards: Option<ShardProgress>,
    bar: Option<ProgressBar>,
    steps: u64,
    tokens_per_step: u64,
    message: String,
    last_line: Option<Instant>,
}

impl Watch {
    /// Shows the preparation of a run; [`Watch::start`] begins with its steps.
    pub fn new(console: &Console, config: &RunConfig) -> Self {
        let train = &config.train;
        Self {
            console: console.clone(),
            shards: Some(ShardProgress::new(console)),
            bar: None,
            steps: train.steps,
            tokens_per_step: (train.batch_size * train.grad_accum * config.model.seq_len) as u64,
            message: String::new(),
            last_line: None,
        }
    }

    /// The steps after `step` begin.
    pub fn start(&mut self, step: u64) {
        self.shards = None;
        if step < self.steps {
            self.bar = self.console.bar(self.steps, TEMPLATE);
        }
        if let Some(bar) = &self.bar {
            // Steps of earlier sittings must not count as if they had been done just now.
            bar.set_position(step);
            bar.reset_eta();
            bar.set_message("starting");
        }
    }

    /// Takes the bar away.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn logged(&mut self, records: &[StepRecord]) {
        let Some(last) = records.last() else { return };
        self.message = format!("loss {:.4}  {} tokens/s", last.loss, grouped(last.tokens_per_s as u64));
        if let Some(bar) = &self.bar {
            bar.set_message(self.message.clone());
        }
        let due = self.last_line.is_none_or(|line| line.elapsed() > PAUSE) || last.step == self.steps;
        if self.console.is_plain() && due {
            let left = (self.steps - last.step) * self.tokens_per_step;
            let eta = seconds(left as f64 / last.tokens_per_s.max(1e-9));
            self.console.line(format_args!("step {}/{}  {}  ETA {eta}", last.step, self.steps, self.message));
            self.last_line = Some(Instant::now());
        }
    }

    fn validated(&mut self, record: &ValidRecord) {
        let ValidRecord { step, val_loss, val_bits_per_byte, .. } = record;
        let line = format!(
            "step {step}/{}  validation: {val_loss:.4} nats/token, {val_bits_per_byte:.4} bits/byte",
            self.steps
        );
        self.console.line(line);
        if let Some(bar) = &self.bar {
            bar.set_message(self.message.clone());
        }
    }
}

impl Observer for Watch {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Data(event) => {
                if let Some(shards) = &self.shards {
                    shards.report(event);
                }
            }
            Event::Skipped(error) => self.console.warn(format_args!("{error}; the one before it is used")),
            Event::Resumed { checkpoint: Some(path), step } => {
                self.console.line(format_args!("resuming after step {step}, from {}", path.display()));
            }
            Event::Resumed { checkpoint: None, .. } => {
                self.console.line("the run was stopped before its first checkpoint; it starts again at step 1");
            }
            Event::Warning(text) => self.console.warn(text),
            Event::Step { step, .. } => {
                if let Some(bar) = &self.bar {
                    bar.set_position(step);
                }
            }
            Event::Logged(records) => self.logged(records),
            Event::Validating { .. } => {
                if let Some(bar) = &self.bar {
                    bar.set_message("validating");
                }
            }
            Event::Validated(record) => self.validated(record),
            _ => {}
        }
    }
}
