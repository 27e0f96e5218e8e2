//! The speed of the training step, measured as a run executes it.

mod activity;
mod decode;
mod power;

use std::path::Path;
use std::time::Instant;

use flowhn_model::Branches;
use flowhn_split::ScoreCount;
use flowhn_torch::timeline::Timeline;
use flowhn_torch::{Event, MemoryStats, SideStream, Stream};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::config::RunConfig;
use crate::data::{Dataset, Encoded, Fingerprint, LoaderOptions, Shard, ShardMeta, ShardWriter, TrainLoader};
use crate::estimate::StepFlops;
use crate::optim::AdamW;
use crate::peak::{MatmulRate, device_name, max_memory_bytes};
use crate::step::{CapturedStep, Stepper};
use crate::trainer::{model, prepare_device};
use crate::{Error, Result};

pub use activity::{KernelTime, StepActivity};
pub use decode::{DecodeRow, DecodeSpeed, time_decoding};
pub use power::Power;

/// Steps before the first that counts: compilation, plans, capture.
const WARM_UP: u64 = 5;
/// Steps with marks, the last of which is read: the first are not captured yet.
const PROFILED: u64 = 6;
/// How long steps run on, at least, while the device's power is read: the driver renews its counters slowly.
const POWER_SECONDS: f64 = 1.5;
/// Tokens of a document of the random text.
const DOCUMENT_TOKENS: usize = 8192;

/// How fast a configuration trains.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepSpeed {
    /// What it ran on.
    pub device: String,
    /// Parameters of the model.
    pub parameters: u64,
    /// Projections of the blocks: those whose products are in fp8, and all where any was to be.
    pub fp8_projections: [usize; 2],
    /// Tokens of a step.
    pub tokens_per_step: u64,
    /// Forward and backward FLOPs of the model in a step, attention's scores counted as the causal half.
    pub flops_per_step: u64,
    /// The same with the whole square of the scores.
    pub flops_per_step_full_scores: u64,
    /// FLOPs of blocks that are recomputed, causal: a step computes them beside `flops_per_step`, and no rate counts them.
    pub recomputed_flops_per_step: u64,
    /// Milliseconds of each measured step, in order.
    pub step_ms: Vec<f64>,
    /// The median of them.
    pub median_ms: f64,
    /// Tokens a second at the median.
    pub tokens_per_s: f64,
    /// FLOPs a second at the median.
    pub flops_per_s: f64,
    /// The matmul rate of the device in this dtype, measured just before.
    pub matmul: MatmulRate,
    /// Milliseconds of a step for which the host is busy. A CUDA device waits for it only where these exceed its own.
    pub host_ms: f64,
    /// Most memory of tensors (CUDA) or of the process (CPU) during the steps.
    pub max_memory_bytes: u64,
    /// The loss of the last step, in nats a token.
    pub last_loss: f32,
    /// Where the time of a step goes, from steps of their own with marks between the parts and branches one after the other, and what
    /// lies between two steps.
    pub parts: Vec<PartTime>,
    /// Share of the time from the begin of one such step to that of the next that does not lie between two steps. What a GPU idles inside
    /// of a step is in [`StepActivity::busy_frac`].
    pub busy_frac: f64,
    /// What a GPU launches in a step, from steps of their own, or why that could not be recorded. Absent on the CPU, and where nobody
    /// asked.
    pub activity: Option<std::result::Result<StepActivity, String>>,
    /// What the device draws, from steps of their own, or why that could not be read. Absent on the CPU, and where nobody asked.
    pub power: Option<std::result::Result<Power, String>>,
}

/// The time of one part of a step, forward and backward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartTime {
    /// One of [`flowhn_model::parts`], `optimizer` or `gaps`.
    pub name: String,
    /// Milliseconds.
    pub ms: f64,
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Steps, at least one.
    pub steps: u64,
    /// Whether further steps tell what a GPU draws and what it launches.
    pub details: bool,
}

/// Trains some steps of a configuration on random tokens, and measures them.
///
/// They are the steps of a run: batches from token shards through the prefetching loader, forward, backward, clipping, AdamW with its
/// schedule, one CUDA graph where the configuration says so; losses and norms are read every `train.log_every` steps. Nothing is
/// validated, written or saved.
///
/// # Errors
/// Those of the model and the data; [`Error::Setting`] for no steps.
pub fn time_steps(config: &RunConfig, device: Device, timing: Timing) -> Result<StepSpeed> {
    let steps = timing.steps;
    if steps == 0 {
        return Err(Error::setting("steps", steps, "at least one step must be measured"));
    }
    prepare_device(device, config.train.deterministic)?;
    let matmul = MatmulRate::measure(device, config.train.dtype.kind())?;
    if let Device::Cuda(device_idx) = device {
        MemoryStats::empty_cache()?;
        MemoryStats::reset_peak(device_idx)?;
    }
    let folder = tempfile::tempdir().map_err(Error::io(&std::env::temp_dir(), "create a folder in"))?;
    let mut stepper = stepper(config, device, folder.path(), steps)?;
    let stream = SideStream::enter(device)?;
    for _ in 0..WARM_UP {
        stepper.train_step()?;
    }
    stepper.read()?;
    let mut metrics = Metrics { log_every: config.train.log_every, last_loss: f32::NAN };
    let (step_ms, host_ms) = match device {
        Device::Cuda(device_idx) => on_device(&mut stepper, &mut metrics, steps, device_idx)?,
        _ => on_host(&mut stepper, &mut metrics, steps)?,
    };
    metrics.read(&mut stepper)?;
    let last_loss = metrics.last_loss;
    let max_memory_bytes = max_memory_bytes(device);
    let median_ms = median(&step_ms);
    let (power, activity) = match device {
        Device::Cuda(device_idx) if timing.details => {
            let power = power(&mut stepper, device_idx, median_ms)?;
            (Some(power), Some(activity::of_steps(&mut stepper, device_idx)?))
        }
        _ => (None, None),
    };
    // Parts that overlap have no time of their own.
    stepper.model.set_branches(Branches::Serial)?;
    let (parts, busy_frac) = parts(&mut stepper)?;
    drop(stream);
    if !last_loss.is_finite() {
        let message = format!("the loss after {} steps is {last_loss}: its speed means nothing", WARM_UP + steps);
        return Err(flowhn_torch::Error::invalid("time_steps", message).into());
    }

    let StepFlops { model: flops_per_step, recomputed } = StepFlops::new(config, ScoreCount::Causal)?;
    let tokens_per_step = stepper.tokens_per_step(config.train.batch_size);
    let fp8 = stepper.model.fp8_projections();
    Ok(StepSpeed {
        device: device_name(device),
        parameters: stepper.model.params().n_elements(),
        fp8_projections: [fp8.n_fp8, fp8.n_meant],
        tokens_per_step,
        flops_per_step,
        flops_per_step_full_scores: StepFlops::new(config, ScoreCount::Full)?.model,
        recomputed_flops_per_step: recomputed,
        median_ms,
        tokens_per_s: tokens_per_step as f64 / median_ms * 1e3,
        flops_per_s: flops_per_step as f64 / median_ms * 1e3,
        step_ms,
        matmul,
        host_ms,
        max_memory_bytes,
        last_loss,
        parts,
        busy_frac,
        activity,
        power,
    })
}

/// Reads losses as a run does.
struct Metrics {
    log_every: u64,
    last_loss: f32,
}

impl Metrics {
    fn after_step(&mut self, stepper: &mut Stepper) -> Result<()> {
        let is_due = self.log_every > 0 && stepper.step.is_multiple_of(self.log_every);
        if is_due { self.read(stepper) } else { Ok(()) }
    }

    fn read(&mut self, stepper: &mut Stepper) -> Result<()> {
        if let Some(step) = stepper.read()?.last() {
            self.last_loss = step.loss;
        }
        Ok(())
    }
}

/// Times by events between steps, and the milliseconds that the host spent on each.
fn on_device(stepper: &mut Stepper, metrics: &mut Metrics, steps: u64, device_idx: usize) -> Result<(Vec<f64>, f64)> {
    let stream = Stream::current(device_idx)?;
    let mut marks = Vec::with_capacity(steps as usize + 1);
    let mark = || -> Result<Event> {
        let mut event = Event::new(true)?;
        event.record(stream)?;
        Ok(event)
    };
    marks.push(mark()?);
    let mut host_ms = 0.;
    for _ in 0..steps {
        let step_began = Instant::now();
        stepper.train_step()?;
        marks.push(mark()?);
        host_ms += step_began.elapsed().as_secs_f64() * 1e3 / steps as f64;
        metrics.after_step(stepper)?;
    }
    stream.synchronize()?;
    let times = marks.windows(2).map(|pair| Ok(pair[0].elapsed_ms(&pair[1])?)).collect::<Result<Vec<f64>>>()?;
    Ok((times, host_ms))
}

/// What the device draws over steps like those that were measured.
fn power(stepper: &mut Stepper, device_idx: usize, step_ms: f64) -> Result<std::result::Result<Power, String>> {
    let n_steps = (POWER_SECONDS * 1e3 / step_ms).ceil().max(1.) as u64;
    power::while_running(device_idx, || {
        for _ in 0..n_steps {
            stepper.train_step()?;
        }
        stepper.read().map(drop)
    })
}

/// Where the time of a step goes. A captured step is captured anew, with marks in it.
fn parts(stepper: &mut Stepper) -> Result<(Vec<PartTime>, f64)> {
    let timeline = Timeline::start(stepper.device())?;
    if stepper.captured.take().is_some() {
        stepper.captured = Some(CapturedStep::new());
    }
    for _ in 0..PROFILED {
        stepper.train_step()?;
    }
    stepper.read()?;
    let (walked, idle_ms) = timeline.parts()?;
    let busy_ms: f64 = walked.iter().map(|part| part.ms).sum();
    let mut parts: Vec<PartTime> =
        walked.into_iter().map(|part| PartTime { name: part.name.to_owned(), ms: part.ms }).collect();
    parts.push(PartTime { name: "gaps".to_owned(), ms: idle_ms });
    Ok((parts, busy_ms / (busy_ms + idle_ms)))
}

fn on_host(stepper: &mut Stepper, metrics: &mut Metrics, steps: u64) -> Result<(Vec<f64>, f64)> {
    let mut times = Vec::with_capacity(steps as usize);
    for _ in 0..steps {
        let began = Instant::now();
        stepper.train_step()?;
        metrics.after_step(stepper)?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    let host_ms = times.iter().sum::<f64>() / steps as f64;
    Ok((times, host_ms))
}

fn stepper(config: &RunConfig, device: Device, folder: &Path, steps: u64) -> Result<Stepper> {
    let train = &config.train;
    let dataset = random_text(config, folder, WARM_UP + steps + PROFILED)?;
    let options =
        LoaderOptions { seq_len: config.model.seq_len, batch_size: train.batch_size, seed: train.seed, prefetch: 4 };
    let model = model(config, device)?;
    let optimizer = AdamW::of_params(model.params(), train.optimizer())?;
    Ok(Stepper {
        optimizer,
        loader: TrainLoader::new(&dataset, &options)?,
        learning_rate: train.learning_rate(),
        grad_accum: train.grad_accum,
        reset_documents: config.data.reset_documents,
        captured: (device.is_cuda() && train.cuda_graph).then(CapturedStep::new),
        step: 0,
        unread: Vec::new(),
        model,
    })
}

/// A shard of random tokens, enough for so many steps.
fn random_text(config: &RunConfig, folder: &Path, steps: u64) -> Result<Dataset> {
    let vocab_size = config.model.vocab_size as u32;
    let meta = ShardMeta { vocab_size, eot_id: 0, tokenizer: Fingerprint::of_bytes(b"random tokens") };
    let path = folder.join("random.tokens");
    let mut writer = ShardWriter::create(&path, meta)?;
    let tokens = (config.train.batch_size * config.train.grad_accum * config.model.seq_len) as u64 * steps;
    let mut rng = ChaCha8Rng::seed_from_u64(config.train.seed);
    while writer.n_tokens() <= tokens {
        let ids: Vec<u32> = (0..DOCUMENT_TOKENS).map(|_| 1 + rng.next_u32() % (vocab_size - 1)).collect();
        let document = Encoded { byte_lens: vec![1; ids.len()], ids };
        writer.push(&document, DOCUMENT_TOKENS as u64, writer.n_documents(), 1 + writer.n_documents())?;
    }
    writer.finish()?;
    Ok(Dataset::new(vec![(Shard::open(&path)?, path)])?)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
