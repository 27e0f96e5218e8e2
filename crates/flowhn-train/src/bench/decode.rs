//! The speed of inference: a prompt at once, then token by token.

use std::time::Instant;

use flowhn_model::{Decoder, Model, ModelConfig, StepLaunch};
use flowhn_torch::Stream;
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::median;
use crate::config::RunConfig;
use crate::peak::device_name;
use crate::trainer::prepare_device;
use crate::{Error, Result};

/// Runs of a prompt, after one that warms up.
const PROMPTS: usize = 5;
/// Decoded tokens before the first that counts; the second is captured where steps are.
const WARM_UP: usize = 8;

/// How fast a model reads and writes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DecodeSpeed {
    /// What it ran on.
    pub device: String,
    /// Parameters of the model.
    pub parameters: u64,
    /// Tokens of the prompt.
    pub prompt_len: usize,
    /// Tokens of a prompt a second, one sequence; the median of some runs.
    pub prefill_tokens_per_s: f64,
    /// Token by token after such a prompt: on a GPU for each batch size from CUDA graphs and operator by operator.
    pub decode: Vec<DecodeRow>,
    /// Bytes that decoding keeps after such a prompt, divided by its tokens.
    pub cache_bytes_per_token: f64,
    /// The same for a model whose every token goes to attention.
    pub cache_bytes_per_token_attention: f64,
}

/// Decoding at one batch size.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DecodeRow {
    /// Sequences side by side.
    pub batch: usize,
    /// How steps run.
    pub launch: StepLaunch,
    /// Tokens of all of them a second, by the median time of a step.
    pub tokens_per_s: f64,
    /// Milliseconds of a step: the median.
    pub step_ms: f64,
    /// Bytes that decoding holds after the steps, room for later tokens included.
    pub cache_bytes: u64,
}

/// Measures a configuration with random weights: a prompt of `prompt_len` random tokens, then `steps` tokens at each batch size.
///
/// # Errors
/// Those of the model; [`Error::Setting`] for no steps or no prompt.
pub fn time_decoding(
    config: &RunConfig,
    device: Device,
    prompt_len: usize,
    batches: &[usize],
    steps: usize,
) -> Result<DecodeSpeed> {
    if steps == 0 || prompt_len == 0 {
        return Err(Error::setting("steps and prompt", 0, "at least one token must be read and one written"));
    }
    prepare_device(device, config.train.deterministic)?;
    let mut model = Model::new(&config.model, device, config.train.seed)?;
    model.set_compute_kind(config.train.dtype.kind());
    let prompt = |batch: usize| random_ids(&config.model, batch, prompt_len, device);

    let ids = prompt(1)?;
    let mut prefill_s = Vec::with_capacity(PROMPTS);
    for run in 0..=PROMPTS {
        let mut decoder = model.decoder(1)?;
        let began = synchronized(device)?;
        let _ = decoder.feed(&ids)?;
        let took = (synchronized(device)? - began).as_secs_f64();
        if run > 0 {
            prefill_s.push(took);
        }
    }

    let mut decode = Vec::with_capacity(batches.len());
    let launches: &[StepLaunch] =
        if device.is_cuda() { &[StepLaunch::Graph, StepLaunch::Operators] } else { &[StepLaunch::Operators] };
    for (&batch, &launch) in batches.iter().flat_map(|batch| launches.iter().map(move |launch| (batch, launch))) {
        let mut decoder = model.decoder(batch)?;
        decoder.set_step_launch(launch);
        let _ = decoder.feed(&prompt(batch)?)?;
        let step_ms = median(&step_times(&mut decoder, &model, batch, steps)?);
        let (tokens_per_s, cache_bytes) = (batch as f64 / step_ms * 1e3, decoder.cache_bytes());
        decode.push(DecodeRow { batch, launch, tokens_per_s, step_ms, cache_bytes });
    }

    Ok(DecodeSpeed {
        device: device_name(device),
        parameters: model.params().n_elements(),
        prompt_len,
        prefill_tokens_per_s: prompt_len as f64 / median(&prefill_s),
        decode,
        cache_bytes_per_token: cache_bytes(&model, &ids)?,
        cache_bytes_per_token_attention: attention_cache_bytes(config),
    })
}

/// Milliseconds of each step, sampled greedily on the device.
fn step_times(decoder: &mut Decoder, model: &Model, batch: usize, steps: usize) -> Result<Vec<f64>> {
    let device = model.device();
    let mut ids = random_ids(model.config(), batch, 1, device)?;
    let mut times = Vec::with_capacity(steps);
    for step in 0..WARM_UP + steps {
        let began = synchronized(device)?;
        let logits = decoder.feed(&ids)?;
        ids = logits.f_argmax(-1, true).map_err(flowhn_torch::Error::from)?;
        let took = (synchronized(device)? - began).as_secs_f64();
        if step >= WARM_UP {
            times.push(took * 1e3);
        }
    }
    Ok(times)
}

fn cache_bytes(model: &Model, ids: &Tensor) -> Result<f64> {
    let mut decoder = model.decoder(1)?;
    let _ = decoder.feed(ids)?;
    Ok(decoder.cache_bytes() as f64 / ids.numel() as f64)
}

/// Keys and values of every token in every block.
fn attention_cache_bytes(config: &RunConfig) -> f64 {
    let attn = &config.model.attn;
    let element = config.train.dtype.kind().elt_size_in_bytes();
    (2 * config.model.n_layers * attn.n_kv_heads * attn.d_head * element) as f64
}

fn random_ids(config: &ModelConfig, batch: usize, len: usize, device: Device) -> Result<Tensor> {
    let shape = [batch as i64, len as i64];
    Ok(Tensor::f_randint(config.vocab_size as i64, shape, (Kind::Int64, device)).map_err(flowhn_torch::Error::from)?)
}

/// The time when the device has done everything.
fn synchronized(device: Device) -> Result<Instant> {
    if let Device::Cuda(device_idx) = device {
        Stream::current(device_idx)?.synchronize()?;
    }
    Ok(Instant::now())
}
