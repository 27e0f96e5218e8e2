//! Getting a run ready: text, model, optimiser, the checkpoint to go on from, and the logs.

use std::fs;
use std::sync::Mutex;

use flowhn_model::Model;
use flowhn_torch::Flag;
use tch::{Device, Tensor};

use super::{Clock, TrainOptions, Trainer};
use crate::checkpoint::{self, Checkpoint, CheckpointProblem, DeviceType, FP8_SCALES, OPTIMIZER_FILE};
use crate::config::{Dtype, RunConfig};
use crate::data::{
    self, Dataset, LoaderOptions, PrepareOptions, ReadOptions, Tokenizer, TrainLoader, ValidationSet, prepare,
};
use crate::estimate::Estimate;
use crate::metrics::{EventWriter, Log, read};
use crate::observe::{Event, Observer};
use crate::optim::AdamW;
use crate::peak::MatmulRate;
use crate::run_dir::{self, RunDir, Start};
use crate::step::{CapturedStep, Stepper};
use crate::{Error, Result};

impl Trainer {
    /// Gets a run ready: locks its directory, prepares the text, makes the model, and goes on from the newest usable
    /// checkpoint where the run is resumed.
    ///
    /// # Errors
    /// Those of the run directory ([`Error::RunExists`], [`Error::RunLocked`], ...), of the text ([`Error::Data`]), of the
    /// configuration ([`Error::Setting`], [`Error::Model`]), and of the checkpoint ([`Error::Checkpoint`],
    /// [`Error::NoCheckpoint`]).
    pub fn new(config: &RunConfig, options: &TrainOptions, observer: &mut dyn Observer) -> Result<Self> {
        config.data.check_for_training()?;
        prepare_device(options.device, config.train.deterministic)?;
        let run = RunDir::open(&config.run.dir, options.start, options.storage.clone())?;
        let tokenizer = Tokenizer::load(&config.data.tokenizer)?;
        tokenizer.check_vocab_size(config.model.vocab_size)?;
        let checkpoint = find_checkpoint(&run, options, config, &tokenizer, observer)?;
        let (train_data, valid) = load_data(config, &tokenizer, observer)?;

        let model = model(config, options.device)?;
        let mut optimizer = AdamW::of_params(model.params(), config.train.optimizer())?;
        let loader = loader(config, options, &train_data, checkpoint.as_ref())?;
        if let Some(checkpoint) = &checkpoint {
            checkpoint.load_into(model.params())?;
            let (scales, state) =
                checkpoint.optimizer()?.into_iter().partition::<Vec<_>, _>(|(name, _)| name == FP8_SCALES);
            let fit = optimizer.load_state(&state).and_then(|()| load_fp8_scales(&model, scales.first()));
            fit.map_err(|message| {
                let problem = CheckpointProblem::Tensors { file: OPTIMIZER_FILE, message };
                Error::checkpoint(checkpoint.path(), problem)
            })?;
        }
        let matmul = MatmulRate::measure(options.device, config.train.dtype.kind())?;
        let estimate = Estimate::new(config, model.params().n_elements(), matmul, options.device)?;
        let before_s = checkpoint.as_ref().map_or(0., |checkpoint| checkpoint.progress().elapsed_s);
        let step = checkpoint.as_ref().map(|checkpoint| checkpoint.progress().step);
        let stepper = Stepper {
            model,
            optimizer,
            loader,
            learning_rate: config.train.learning_rate(),
            grad_accum: config.train.grad_accum,
            reset_documents: config.data.reset_documents,
            captured: (options.device.is_cuda() && config.train.cuda_graph).then(CapturedStep::new),
            step: step.unwrap_or(0),
            unread: Vec::new(),
        };

        let (metrics, validation) = (run.file(run_dir::METRICS), run.file(run_dir::VALIDATION));
        let trainer = Self {
            steps_log: Log::open(&metrics, step)?,
            valid_log: Log::open(&validation, step)?,
            train_records: read(&metrics)?,
            valid_records: read(&validation)?,
            events: EventWriter::create(run.path(), step.unwrap_or(0))?,
            config: config.clone(),
            stepper,
            tokenizer,
            train_data,
            valid,
            estimate,
            last_read: None,
            clock: Clock::new(before_s),
            stop_at: options.stop_at,
            run,
        };
        // These come last: with them, the directory holds a run.
        let tokenizer = &config.data.tokenizer;
        let text = fs::read(tokenizer).map_err(Error::io(tokenizer, "read"))?;
        trainer.run.write(run_dir::TOKENIZER, &text)?;
        trainer.run.write(run_dir::CONFIG, config.to_toml()?.as_bytes())?;
        Ok(trainer)
    }
}

/// Asks a GPU's libraries for deterministic algorithms. The switch belongs to the process, so it is only ever turned on.
pub(crate) fn prepare_device(device: Device, deterministic: bool) -> Result<()> {
    if device.is_cuda() && deterministic && !Flag::Deterministic.is_set()? {
        // That mode would also fill all new memory with NaN, which finds errors and costs time.
        Flag::DeterministicFill.set(false)?;
        Flag::Deterministic.set(true)?;
    }
    Ok(())
}

/// The model of a run with its initial weights, as its section `[train]` has it compute.
pub(crate) fn model(config: &RunConfig, device: Device) -> Result<Model> {
    let train = &config.train;
    let mut model = Model::new(&config.model, device, train.seed)?;
    model.set_compute_kind(train.dtype.kind());
    model.set_branches(train.branches)?;
    model.set_recompute_every(train.recompute_every);
    model.set_logits_bytes(train.logits_bytes());
    model.set_linears(train.linears).map_err(|error| {
        let want = format!("{error}; train.linears = \"dtype\" computes in the type of activations");
        Error::setting("train.linears", "fp8", want)
    })?;
    if train.grads == Dtype::Bf16 {
        model.use_bf16_grads(train.batch_size * config.model.seq_len)?;
    }
    if train.grad_accum > 1 {
        model.params().add_grads_in_place();
    }
    Ok(model)
}

/// The scales of fp8 by the name that they have in a checkpoint, beside the optimiser's state; they share storage with the model's.
pub(crate) fn fp8_scales(model: &Model) -> Option<(String, Tensor)> {
    model.params().fp8_scales().map(|scales| (FP8_SCALES.to_owned(), scales))
}

/// Overwrites the scales of fp8 with those of a checkpoint; either says what is missing, as [`AdamW::load_state`] does.
fn load_fp8_scales(model: &Model, saved: Option<&(String, Tensor)>) -> std::result::Result<(), String> {
    match (model.params().fp8_scales(), saved) {
        (None, None) => Ok(()),
        (Some(_), None) => Err(format!("it has no {FP8_SCALES}")),
        (_, Some((_, values))) => model.params().load_fp8_scales(values).map_err(|error| error.to_string()),
    }
}

fn find_checkpoint(
    run: &RunDir,
    options: &TrainOptions,
    config: &RunConfig,
    tokenizer: &Tokenizer,
    observer: &mut dyn Observer,
) -> Result<Option<Checkpoint>> {
    if options.start == Start::Fresh {
        return Ok(None);
    }
    let latest = checkpoint::latest_valid(&run.checkpoints())?;
    for error in &latest.skipped {
        observer.event(Event::Skipped(error));
    }
    let Some(checkpoint) = latest.checkpoint else {
        observer.event(Event::Resumed { checkpoint: None, step: 0 });
        return Ok(None);
    };
    let progress = checkpoint.progress();
    tokenizer.check_fingerprint(progress.tokenizer, &format!("checkpoint {}", checkpoint.path().display()))?;
    checkpoint.check_config(config)?;
    let mut warn = |before: String, now: String| {
        observer.event(Event::Warning(format!(
            "the checkpoint was computed {before}, this process computes {now}: losses will differ from an \
             uninterrupted run in their last digits"
        )));
    };
    let device = DeviceType::from(options.device);
    let n_threads = tch::get_num_threads().max(1) as usize;
    match progress.device_type {
        Some(before) if before != device => warn(format!("on {before}"), format!("on {device} (--device)")),
        _ if device == DeviceType::Cpu && n_threads != progress.n_threads => {
            warn(format!("with {} threads", progress.n_threads), format!("with {n_threads}"));
        }
        _ => {}
    }
    observer.event(Event::Resumed { checkpoint: Some(checkpoint.path()), step: progress.step });
    Ok(Some(checkpoint))
}

fn load_data(
    config: &RunConfig,
    tokenizer: &Tokenizer,
    observer: &mut dyn Observer,
) -> Result<(Dataset, ValidationSet)> {
    let observer = Mutex::new(observer);
    let progress = |event: &data::Event<'_>| {
        if let Ok(mut observer) = observer.lock() {
            observer.event(Event::Data(event));
        }
    };
    let section = &config.data;
    let options = PrepareOptions { cache_dir: section.cache_dir.clone(), read: ReadOptions::default() };
    let train = prepare(&section.train, tokenizer, &options, &progress)?;
    let (train, valid) = match section.valid.is_empty() {
        true => train.split(section.valid_frac)?,
        false => (train, prepare(&section.valid, tokenizer, &options, &progress)?),
    };
    let batch_size = config.train.batch_size;
    let max_windows = (config.train.eval_batches > 0).then(|| config.train.eval_batches * batch_size as u64);
    let valid = ValidationSet::new(&valid, config.model.seq_len, batch_size, max_windows)?;
    Ok((train, valid))
}

fn loader(
    config: &RunConfig,
    options: &TrainOptions,
    train: &Dataset,
    checkpoint: Option<&Checkpoint>,
) -> Result<TrainLoader> {
    let loader = LoaderOptions {
        seq_len: config.model.seq_len,
        batch_size: config.train.batch_size,
        seed: config.train.seed,
        prefetch: options.prefetch,
    };
    Ok(match checkpoint {
        Some(checkpoint) => TrainLoader::resume(train, &loader, &checkpoint.progress().sampler)?,
        None => TrainLoader::new(train, &loader)?,
    })
}
