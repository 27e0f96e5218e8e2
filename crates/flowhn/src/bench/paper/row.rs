//! A row: its speed, its training, its answers.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flowhn_train::bench::{Timing, time_steps};
use flowhn_train::config::DataConfig;
use flowhn_train::peak::device_name;
use flowhn_train::run_dir::{CONFIG, Start};
use flowhn_train::tasks::{Task, TaskScore};
use flowhn_train::{Outcome, RunConfig, TrainOptions, Trainer};
use serde::{Deserialize, Serialize};
use tch::Device;

use super::published::PublishedRow;
use super::{forget_memory, kept};
use crate::bench::train::{Peak, peak};
use crate::checkpoint_args;
use crate::console::Console;
use crate::eval::{self, TaskArgs};
use crate::interrupt::Interrupt;
use crate::train::watch::Watch;
use crate::units::{grouped, seconds};

/// Everything that is known of a row.
#[derive(Debug)]
pub struct Row {
    /// The name of its file.
    pub model: String,
    /// Its name in the paper.
    pub title: String,
    /// How fast it trains.
    pub speed: Option<Speed>,
    /// How it was trained.
    pub trained: Option<Trained>,
    /// What it answers.
    pub answers: Option<Vec<TaskScore>>,
    /// What was published of it.
    pub published: Option<PublishedRow>,
}

/// How fast a row trains.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// What it was timed on; empty where an earlier version kept it.
    #[serde(default)]
    pub device: String,
    pub parameters: u64,
    pub tokens_per_step: u64,
    pub tokens_per_s: f64,
    pub step_ms: f64,
    /// Of the model, forward and backward, with attention's causal half.
    pub flops_per_s: f64,
    /// The same with the whole square of the scores.
    pub flops_per_s_full_scores: f64,
    pub max_memory_bytes: u64,
    /// The rate of the device in its type: the data sheet's where we know it, else what was measured just before.
    pub peak: Peak,
}

/// How a row was trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trained {
    /// What it was trained on; empty where an earlier version kept it.
    #[serde(default)]
    pub device: String,
    pub parameters: u64,
    pub trained_tokens: u64,
    /// Times the training text was read.
    pub epochs: f64,
    pub val_bits_per_byte: f64,
    /// With validation and checkpoints.
    pub train_seconds: f64,
    /// Of the steps alone.
    pub train_tokens_per_s: f64,
}

impl Row {
    /// A row of which nothing is known but what was published.
    pub fn new(model: &str, title: &str, published: Option<&PublishedRow>) -> Self {
        let (model, title, published) = (model.to_owned(), title.to_owned(), published.cloned());
        Self { model, title, speed: None, trained: None, answers: None, published }
    }

    /// Its accuracy on each task, with the standard error.
    pub fn accuracy(&self) -> BTreeMap<&str, (f64, Option<f64>)> {
        let scores = self.answers.iter().flatten();
        scores.map(|score| (score.task.as_str(), (score.accuracy, score.stderr))).collect()
    }
}

/// What all rows share. Each phase returns `false` where it was interrupted.
pub struct RowContext<'a> {
    pub console: &'a Console,
    pub device: Device,
    /// Training steps to time.
    pub steps: u64,
    pub tasks: &'a [Task],
    pub options: &'a TaskArgs,
    pub interrupt: &'a Interrupt,
    pub out: &'a Path,
}

impl RowContext<'_> {
    /// Times the row's training step, or takes what is kept.
    ///
    /// # Errors
    /// Those of the model and the files.
    pub fn speed(&self, config: &RunConfig, row: &mut Row, wanted: bool) -> Result<bool> {
        let path = self.file(row, "speed.json");
        let mut timed = config.clone();
        // The steps that are timed read random tokens and are not a share of a longer run.
        timed.data = DataConfig { reset_documents: config.data.reset_documents, ..DataConfig::default() };
        timed.run.dir = PathBuf::from("timed");
        timed.train.steps = self.steps;
        timed.train.checkpoint_every = 0;
        let settings = format!("{}\ndevice = {}\n", timed.to_toml()?, device_name(self.device));
        row.speed = kept::read(&path, wanted.then_some(&settings));
        if row.speed.is_none() && wanted {
            forget_memory(self.device)?;
            self.console.line(format_args!("timing {} steps", self.steps));
            let found = time_steps(&timed, self.device, Timing { steps: self.steps, details: false })?;
            let peak = peak(&found, config.train.dtype, self.device);
            let full = found.flops_per_step_full_scores as f64 / found.flops_per_step as f64;
            let speed = Speed {
                device: device_name(self.device),
                parameters: found.parameters,
                tokens_per_step: found.tokens_per_step,
                tokens_per_s: found.tokens_per_s,
                step_ms: found.median_ms,
                flops_per_s: found.flops_per_s,
                flops_per_s_full_scores: found.flops_per_s * full,
                max_memory_bytes: found.max_memory_bytes,
                peak,
            };
            self.keep(&path, &settings, &speed)?;
            row.speed = Some(speed);
        }
        if let Some(speed) = &row.speed {
            let rate = grouped(speed.tokens_per_s as u64);
            self.console.line(format_args!("{rate} tokens/s, {:.2} ms a step", speed.step_ms));
        }
        Ok(!self.interrupt.stop_flag().is_requested())
    }

    /// Trains the row, goes on with its training, or takes what is kept.
    ///
    /// # Errors
    /// Those of a training run.
    pub fn train(&self, config: &RunConfig, row: &mut Row, wanted: bool) -> Result<bool> {
        let path = self.file(row, "train.json");
        let mut steering = config.clone();
        steering.run.dir = PathBuf::from("run");
        let settings = format!("{}\ndevice = {}\n", steering.to_toml()?, device_name(self.device));
        row.trained = kept::read(&path, wanted.then_some(&settings));
        if row.trained.is_some() || !wanted {
            return Ok(true);
        }
        forget_memory(self.device)?;
        let dir = &config.run.dir;
        let start = if dir.join(CONFIG).exists() { Start::Resume } else { Start::Fresh };
        let options = TrainOptions { start, device: self.device, ..TrainOptions::default() };
        let mut watch = Watch::new(self.console, config);
        let mut trainer = Trainer::new(config, &options, &mut watch).with_context(|| {
            format!("an earlier run is in {}; remove it, or keep this table elsewhere with --out", dir.display())
        })?;
        self.interrupt.training_starts();
        watch.start(trainer.step());
        let outcome = trainer.run(&mut watch, self.interrupt.stop_flag());
        watch.finish();
        let Outcome::Done(summary) = outcome? else { return Ok(false) };
        let trained = Trained {
            device: device_name(self.device),
            parameters: summary.parameters,
            trained_tokens: summary.tokens,
            epochs: summary.tokens as f64 / trainer.train_data().n_tokens().max(1) as f64,
            val_bits_per_byte: summary.val_bits_per_byte,
            train_seconds: summary.seconds,
            train_tokens_per_s: summary.train_tokens_per_s,
        };
        self.console.line(format_args!(
            "trained on {} tokens ({:.2} times the text) in {}: {:.4} bits/byte",
            grouped(trained.trained_tokens),
            trained.epochs,
            seconds(trained.train_seconds),
            trained.val_bits_per_byte,
        ));
        self.keep(&path, &settings, &trained)?;
        row.trained = Some(trained);
        Ok(!self.interrupt.stop_flag().is_requested())
    }

    /// Lets the trained row answer the tasks, or takes what is kept.
    ///
    /// # Errors
    /// Those of the checkpoint, the model and the files.
    pub fn eval(&self, config: &RunConfig, row: &mut Row, wanted: bool) -> Result<bool> {
        let path = self.file(row, "eval.json");
        if !wanted || row.trained.is_none() {
            // Answers of a row that is not trained as asked for are those of another row.
            row.answers = row.trained.as_ref().and_then(|_| kept::read(&path, None));
            return Ok(true);
        }
        forget_memory(self.device)?;
        let trained = checkpoint_args::load(&config.run.dir, None, self.device, self.console)?;
        let tasks: Vec<String> =
            self.tasks.iter().map(|task| format!("{} {}", task.name(), task.fingerprint())).collect();
        let settings = format!("{}\n{}\n", trained.checkpoint.weights_hash(), tasks.join("\n"));
        row.answers = kept::read(&path, Some(&settings));
        if row.answers.is_none() {
            let stop = Some(self.interrupt.stop_flag());
            let Some((found, partial)) = eval::score(&trained, self.tasks, self.options, &path, self.console, stop)?
            else {
                return Ok(false);
            };
            let answers: Vec<TaskScore> = found.results.into_iter().map(|result| result.score).collect();
            self.keep(&path, &settings, &answers)?;
            partial.remove()?;
            row.answers = Some(answers);
        }
        let told = |score: &TaskScore| format!("{} {:.1}", score.task, 100. * score.accuracy);
        let told: Vec<String> = row.answers.iter().flatten().map(told).collect();
        self.console.line(format_args!("accuracy %: {}", told.join(", ")));
        Ok(!self.interrupt.stop_flag().is_requested())
    }

    fn file(&self, row: &Row, name: &str) -> PathBuf {
        self.out.join(&row.model).join(name)
    }

    fn keep<T: Serialize>(&self, path: &Path, settings: &str, result: &T) -> Result<()> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(|| format!("{}: cannot be made", dir.display()))?;
        }
        kept::write(path, settings, result)
    }
}
