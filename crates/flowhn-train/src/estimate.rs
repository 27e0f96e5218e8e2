//! What a run will need, told before it starts.

use flowhn_model::ModelConfig;
use flowhn_nn::logits_are_one_chunk;
use flowhn_split::{Element, ModelFlops, ScoreCount, Sharing};
use serde::Serialize;
use tch::Device;

use crate::config::{Dtype, RunConfig, TrainConfig};
use crate::peak::MatmulRate;
use crate::{Error, Result};

/// Memory and time of a run, estimated from shapes and from the measured matmul rate.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Parameters of the model.
    pub parameters: u64,
    /// Memory that training needs.
    pub memory: MemoryEstimate,
    /// Bytes that are free on the device; `None` where the system does not tell.
    pub available_bytes: Option<u64>,
    /// Bytes of one checkpoint on disk.
    pub checkpoint_bytes: u64,
    /// Tokens of the whole run.
    pub tokens: u64,
    /// Forward and backward FLOPs of the model for a token, as routed at the training length, rounded down.
    pub flops_per_token: u64,
    /// Forward and backward FLOPs of the model in a step, which MFU refers to.
    pub flops_per_step: u64,
    /// FLOPs that a step computes beside those, for the blocks that are recomputed.
    pub recomputed_flops_per_step: u64,
    /// The rate that MFU refers to.
    pub matmul: MatmulRate,
    /// Seconds that the run would take at that rate: a lower bound, which real steps exceed by 1 over their MFU.
    pub least_seconds: f64,
}

/// Bytes of memory by what they hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// fp32 parameters, and their bf16 copies where the step computes in bf16.
    pub parameters_bytes: u64,
    /// Gradients: fp32, or bf16 in the blocks where `train.grads` asks for it, whose norms and vectors are not counted apart.
    pub gradients_bytes: u64,
    /// AdamW's two means, in the type of the state; small tensors that stay fp32 are not counted apart.
    pub optimizer_bytes: u64,
    /// What a micro-batch's forward pass keeps for the backward pass, and the largest block that is recomputed.
    pub activations_bytes: u64,
    /// The sum: gradients come while activations go, so not all of it is there at once. libtorch itself, token shards and workspaces come on top.
    pub total_bytes: u64,
}

impl Estimate {
    /// Estimates the run of a configuration whose model has `parameters` parameters.
    ///
    /// # Errors
    /// [`Error::Model`] where the policies do not fit the blocks, which a checked configuration excludes.
    pub fn new(config: &RunConfig, parameters: u64, matmul: MatmulRate, device: Device) -> Result<Self> {
        let (model, train) = (&config.model, &config.train);
        let memory = MemoryEstimate::new(model, train, parameters)?;
        let tokens_per_step = (train.batch_size * train.grad_accum * model.seq_len) as u64;
        let StepFlops { model: flops_per_step, recomputed } = StepFlops::new(config, ScoreCount::Causal)?;
        Ok(Self {
            parameters,
            memory,
            available_bytes: available_bytes(device),
            // Weights and two means.
            checkpoint_bytes: 4 * parameters + memory.optimizer_bytes,
            tokens: tokens_per_step * train.steps,
            flops_per_token: flops_per_step / tokens_per_step,
            flops_per_step,
            recomputed_flops_per_step: recomputed,
            least_seconds: (flops_per_step + recomputed) as f64 * train.steps as f64 / matmul.flops_per_s,
            matmul,
        })
    }

    /// Whether the estimate exceeds what is free.
    pub fn exceeds_memory(&self) -> bool {
        self.available_bytes.is_some_and(|available| self.memory.total_bytes > available)
    }
}

/// FLOPs of a training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StepFlops {
    /// Forward and backward pass of the model.
    pub model: u64,
    /// The forward passes of the blocks that are recomputed.
    pub recomputed: u64,
}

impl StepFlops {
    /// Counts those of a configuration's step.
    ///
    /// # Errors
    /// As [`Estimate::new`].
    pub fn new(config: &RunConfig, scores: ScoreCount) -> Result<Self> {
        let (model, train) = (&config.model, &config.train);
        let sequence = ModelFlops::new(&model.shape(), &model.routing()?, model.seq_len, scores)
            .map_err(|error| Error::Model(error.into()))?;
        let n_sequences = (train.batch_size * train.grad_accum) as u64;
        let recomputed = sequence.recomputed(|block_idx| train.recompute_every.takes(block_idx));
        Ok(Self { model: sequence.training() * n_sequences, recomputed: recomputed * n_sequences })
    }
}

impl MemoryEstimate {
    /// The bytes that training a model of `parameters` parameters needs.
    ///
    /// Activations follow from the traffic that `flowhn_split` counts for a forward pass: every intermediate result is written
    /// once and read about once, and is kept, so half of the traffic that is not weights. Of a block that is recomputed the input is
    /// kept, and all of one such block at a time. Logits are counted as on a GPU, up to `train.logits_mib`; on a CPU they are a few MiB.
    ///
    /// # Errors
    /// As [`Estimate::new`].
    pub fn new(model: &ModelConfig, train: &TrainConfig, parameters: u64) -> Result<Self> {
        let (element, copies) = match train.dtype {
            Dtype::Fp32 => (Element::Fp32, 0),
            Dtype::Bf16 => (Element::Bf16, 2),
        };
        let routing = model.routing()?;
        let plan = routing.plan(model.seq_len + model.options.n_meta).map_err(|error| Error::Model(error.into()))?;
        let shape = model.shape();
        let stream = element.size_bytes() * (plan.seq_len() * model.d_model) as u64;
        let (mut kept, mut largest, mut in_blocks) = (0, 0, 0);
        for (block_idx, ((shape, route), plan)) in
            shape.blocks.iter().zip(routing.blocks()).zip(plan.blocks()).enumerate()
        {
            let sharing: Sharing = route.sharing();
            let params = shape.params(sharing).total;
            in_blocks += params;
            let weights = element.size_bytes() * params;
            let block = shape.bytes(sharing, plan, element).total.saturating_sub(weights) / 2;
            let is_recomputed = train.recompute_every.takes(block_idx);
            kept += if is_recomputed { stream } else { block };
            largest = largest.max(if is_recomputed { block } else { 0 });
        }
        // The embedding's output, the final norm's, and the head's input kept in its type.
        let outer = 3 * element.size_bytes() * (model.seq_len * model.d_model) as u64;
        let n_tokens = train.batch_size * model.seq_len;
        let logits = (element.size_bytes() * (n_tokens * model.vocab_size) as u64).min(train.logits_bytes());
        let activations_bytes = train.batch_size as u64 * (kept + largest + outer) + logits;
        let takes_head =
            !model.tie_embeddings && logits_are_one_chunk(n_tokens, model.vocab_size, train.logits_bytes());
        let head = if takes_head { (model.vocab_size * model.d_model) as u64 } else { 0 };
        let in_bf16 = if train.grads == Dtype::Bf16 { in_blocks + head } else { 0 };
        let (parameters_bytes, gradients_bytes, optimizer_bytes) =
            ((4 + copies) * parameters, 4 * parameters - 2 * in_bf16, train.optim_state.n_bytes(parameters));
        let total_bytes = parameters_bytes + gradients_bytes + optimizer_bytes + activations_bytes;
        Ok(Self { parameters_bytes, gradients_bytes, optimizer_bytes, activations_bytes, total_bytes })
    }
}

fn available_bytes(device: Device) -> Option<u64> {
    if let Device::Cuda(idx) = device {
        return flowhn_torch::MemoryStats::of(idx).ok().map(|stats| stats.free_bytes);
    }
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
