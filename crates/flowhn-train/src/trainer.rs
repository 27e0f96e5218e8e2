//! A whole run: from a configuration to trained weights, checkpoints, logs and a summary.

mod setup;

pub(crate) use setup::{fp8_scales, model, prepare_device};

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use flowhn_model::Model;
use flowhn_torch::SideStream;
use tch::{Device, Tensor};

use crate::checkpoint::{self, Progress, Snapshot};
use crate::config::RunConfig;
use crate::data::{Dataset, Tokenizer, ValidationSet};
use crate::estimate::Estimate;
use crate::eval::evaluate;
use crate::metrics::{EventWriter, Log, Record, StepRecord, ValidRecord};
use crate::observe::{Event, Observer, StopFlag};
use crate::peak::max_memory_bytes;
use crate::run_dir::{self, RunDir, Start};
use crate::step::{ReadStep, Stepper};
use crate::storage::{Disk, Storage};
use crate::summary::Summary;
use crate::{Error, Result, plot};

/// How a run is carried out; nothing here changes what it computes, save the device.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Whether the run starts or goes on.
    pub start: Start,
    /// Where it computes.
    pub device: Device,
    /// Ends this sitting after so many steps of the run, as a request to stop does.
    pub stop_at: Option<u64>,
    /// Batches that a thread prepares ahead.
    pub prefetch: usize,
    /// Where durable files go.
    pub storage: Arc<dyn Storage>,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self { start: Start::Fresh, device: Device::Cpu, stop_at: None, prefetch: 2, storage: Arc::new(Disk) }
    }
}

/// How a sitting ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The run is complete.
    Done(Box<Summary>),
    /// It was asked to stop; resuming goes on from the checkpoint.
    Stopped {
        /// Steps done.
        step: u64,
        /// The checkpoint just written.
        checkpoint: PathBuf,
    },
}

/// A run that is ready to train.
///
/// A run that is interrupted at any point and resumed ends in the same weights, optimiser state and logged losses, to the last
/// bit, as one that was not, on the same machine with the same number of threads: a step depends on nothing but the
/// weights, the optimiser's state, the sampler's state and the step's number, and a checkpoint holds these.
pub struct Trainer {
    config: RunConfig,
    run: RunDir,
    stepper: Stepper,
    tokenizer: Tokenizer,
    train_data: Dataset,
    valid: ValidationSet,
    estimate: Estimate,
    steps_log: Log<StepRecord>,
    valid_log: Log<ValidRecord>,
    events: EventWriter,
    train_records: Vec<StepRecord>,
    valid_records: Vec<ValidRecord>,
    /// The newest step whose loss has been read.
    last_read: Option<ReadStep>,
    clock: Clock,
    stop_at: Option<u64>,
}

impl Trainer {
    /// Trains until the end, a request to stop, or an error; a run that is complete already returns its summary.
    ///
    /// # Errors
    /// [`Error::NonFinite`] when training diverges; [`Error::DiskFull`], [`Error::Io`], [`Error::Data`], [`Error::Model`].
    pub fn run(&mut self, observer: &mut dyn Observer, stop: &StopFlag) -> Result<Outcome> {
        let _stream = SideStream::enter(self.stepper.device())?;
        self.clock.start();
        let steps = self.config.train.steps;
        while self.step() < steps {
            self.stepper.train_step().map_err(|error| self.explain_memory(error))?;
            let step = self.step();
            observer.event(Event::Step { step, steps });

            let train = &self.config.train;
            let every = |n: u64| n > 0 && step.is_multiple_of(n);
            let last = step == steps;
            let stopping = stop.is_requested() || self.stop_at.is_some_and(|at| step >= at);
            let validate = last || every(train.eval_every);
            let save = last || stopping || every(train.checkpoint_every);
            if validate || save || every(train.log_every) {
                self.log_losses(observer)?;
            }
            if validate {
                self.validate(observer)?;
            }
            if save {
                let checkpoint = self.save(observer)?;
                if stopping && !last {
                    return Ok(Outcome::Stopped { step, checkpoint });
                }
            }
        }
        self.finish(observer).map(|summary| Outcome::Done(Box::new(summary)))
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.stepper.step
    }

    /// Tokens trained on.
    pub fn tokens(&self) -> u64 {
        self.step() * self.stepper.tokens_per_step(self.config.train.batch_size)
    }

    /// The checked configuration.
    pub fn config(&self) -> &RunConfig {
        &self.config
    }

    /// What the run needs, estimated.
    pub fn estimate(&self) -> &Estimate {
        &self.estimate
    }

    /// The run's directory.
    pub fn run_dir(&self) -> &Path {
        self.run.path()
    }

    /// The model as it is now.
    pub fn model(&self) -> &Model {
        &self.stepper.model
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The training text.
    pub fn train_data(&self) -> &Dataset {
        &self.train_data
    }

    /// The validation text.
    pub fn valid(&self) -> &ValidationSet {
        &self.valid
    }

    /// The optimiser's state by name, see [`crate::optim::AdamW::state`], and the scales of fp8, where there are any.
    pub fn optimizer_state(&self) -> Vec<(String, Tensor)> {
        self.stepper.optimizer.state().into_iter().chain(fp8_scales(&self.stepper.model)).collect()
    }

    /// Reads the losses of the steps since the last reading, checks and logs them.
    fn log_losses(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let read = self.stepper.read()?;
        let tokens_per_step = self.stepper.tokens_per_step(self.config.train.batch_size);
        let lap_s = self.clock.lap();
        let steps_per_s = read.len() as f64 / lap_s;
        let max_memory_bytes = max_memory_bytes(self.stepper.device());
        let mut records = Vec::with_capacity(read.len());
        let mut diverged = None;
        for step in read {
            if !(step.loss.is_finite() && step.grad_norm.is_finite()) {
                diverged = Some(self.non_finite("the loss or its gradient is not a number", &step));
                break;
            }
            records.push(StepRecord {
                step: step.step,
                tokens: step.step * tokens_per_step,
                loss: step.loss,
                lr: step.lr,
                grad_norm: step.grad_norm,
                tokens_per_s: steps_per_s * tokens_per_step as f64,
                mfu: steps_per_s * self.estimate.flops_per_step as f64 / self.estimate.matmul.flops_per_s,
                max_memory_bytes,
                elapsed_s: self.clock.elapsed_s(),
            });
            self.last_read = Some(step);
        }
        self.steps_log.append(&records)?;
        for record in &records {
            self.events.scalars(record.step, &record.scalars())?;
        }
        observer.event(Event::Logged(&records));
        self.train_records.append(&mut records);
        diverged.map_or(Ok(()), Err)
    }

    fn validate(&mut self, observer: &mut dyn Observer) -> Result<()> {
        observer.event(Event::Validating { step: self.step() });
        let score = evaluate(&self.stepper.model, &self.valid, self.stepper.reset_documents)?;
        let record = ValidRecord {
            step: self.step(),
            tokens: self.tokens(),
            val_loss: score.nats_per_token(),
            val_bits_per_byte: score.bits_per_byte(),
            elapsed_s: self.clock.elapsed_s(),
        };
        self.valid_log.append(std::slice::from_ref(&record))?;
        self.events.scalars(record.step, &record.scalars())?;
        observer.event(Event::Validated(&record));
        self.valid_records.push(record);
        self.draw_plot(None)?;
        self.clock.skip();
        Ok(())
    }

    /// Writes a checkpoint; the losses up to it have been read and found finite.
    fn save(&mut self, observer: &mut dyn Observer) -> Result<PathBuf> {
        self.check_weights()?;
        self.steps_log.sync()?;
        self.valid_log.sync()?;
        let params = self.stepper.model.params().iter();
        let snapshot = Snapshot {
            progress: Progress {
                step: self.step(),
                tokens: self.tokens(),
                elapsed_s: self.clock.elapsed_s(),
                n_threads: tch::get_num_threads().max(1) as usize,
                device_type: Some(self.stepper.model.params().device().into()),
                sampler: self.stepper.loader.state().clone(),
                tokenizer: self.tokenizer.fingerprint(),
            },
            config: &self.config.to_toml()?,
            model: params.map(|param| (param.name.clone(), param.weight.master().detach())).collect(),
            optimizer: self.optimizer_state(),
        };
        let (storage, dir) = (self.run.storage(), self.run.checkpoints());
        let path = checkpoint::save(storage, &dir, &snapshot)?;
        let removed = checkpoint::prune(storage, &dir, self.step(), self.config.train.keep_last)?;
        observer.event(Event::Saved { path: &path, removed: &removed });
        self.clock.skip();
        Ok(path)
    }

    /// Adds to a shortage of memory what of the run asked for it.
    fn explain_memory(&self, error: Error) -> Error {
        match error.out_of_memory() {
            None => error,
            Some(message) => Error::OutOfMemory {
                step: self.step() + 1,
                batch_size: self.config.train.batch_size,
                seq_len: self.config.model.seq_len,
                message: message.to_owned(),
            },
        }
    }

    /// The last line of defence before weights are saved: a finite gradient can still lead to weights that are not.
    fn check_weights(&self) -> Result<()> {
        match (self.stepper.optimizer.params_norm()?.is_finite(), &self.last_read) {
            (false, Some(step)) => Err(self.non_finite("its update made weights that are not numbers", step)),
            _ => Ok(()),
        }
    }

    fn non_finite(&self, what: &'static str, step: &ReadStep) -> Error {
        const SHOWN: usize = 8;
        let rows = step.batches.iter().flat_map(|batch| self.stepper.loader.provenance(batch));
        let rows: Vec<String> = rows.map(|row| row.to_string()).collect();
        let more = rows.len().saturating_sub(SHOWN);
        let mut provenance = rows[..rows.len() - more].join("; ");
        if more > 0 {
            provenance.push_str(&format!("; and {more} more rows"));
        }
        let last_good = checkpoint::latest_valid(&self.run.checkpoints())
            .ok()
            .and_then(|latest| latest.checkpoint)
            .map(|checkpoint| checkpoint.path().to_owned());
        let &ReadStep { step, loss, grad_norm, .. } = step;
        Error::NonFinite { step, what, loss, grad_norm, provenance, last_good }
    }

    /// The summary of a complete run, with its files.
    fn finish(&mut self, observer: &mut dyn Observer) -> Result<Summary> {
        // A run that was complete when it was opened may have lost the line of its last validation.
        if self.valid_records.last().is_none_or(|record| record.step < self.step()) {
            self.validate(observer)?;
        }
        let seconds = self.clock.elapsed_s();
        let summary = Summary::new(self, seconds)?;
        self.draw_plot(Some(summary.unigram_loss))?;
        self.run.write(run_dir::SUMMARY, summary.to_json().as_bytes())?;
        Ok(summary)
    }

    fn draw_plot(&self, unigram_nats: Option<f64>) -> Result<()> {
        let path = self.run.file(run_dir::LOSS_PLOT);
        let name = self.run.path().file_name().unwrap_or_default().to_string_lossy();
        let millions = self.estimate.parameters as f64 / 1e6;
        let title = format!("{name}: {millions:.1}M parameters");
        let svg = plot::loss_svg(&path, &title, &self.train_records, &self.valid_records, unigram_nats)?;
        self.run.write(run_dir::LOSS_PLOT, svg.as_bytes())
    }

    pub(crate) fn train_records(&self) -> &[StepRecord] {
        &self.train_records
    }

    pub(crate) fn valid_records(&self) -> &[ValidRecord] {
        &self.valid_records
    }
}

/// Seconds in the training loop, and of the steps since the last reading of the device.
struct Clock {
    before_s: f64,
    started: Instant,
    lap: Instant,
}

impl Clock {
    fn new(before_s: f64) -> Self {
        Self { before_s, started: Instant::now(), lap: Instant::now() }
    }

    fn start(&mut self) {
        *self = Self::new(self.before_s);
    }

    fn elapsed_s(&self) -> f64 {
        self.before_s + self.started.elapsed().as_secs_f64()
    }

    /// Seconds since the last lap; starts the next.
    fn lap(&mut self) -> f64 {
        let seconds = self.lap.elapsed().as_secs_f64();
        self.skip();
        seconds.max(1e-9)
    }

    /// Leaves what was just done out of the next lap.
    fn skip(&mut self) {
        self.lap = Instant::now();
    }
}
