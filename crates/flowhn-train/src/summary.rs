//! What came out of a run, in numbers.

use std::ops::ControlFlow;

use serde::Serialize;

use crate::Result;
use crate::data::Unigram;
use crate::generate::{SampleOptions, generate};
use crate::peak::device_name;
use crate::trainer::Trainer;

/// The contents of `summary.json`, and a sample of what the model writes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Parameters of the model.
    pub parameters: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Seconds in the training loop with its validations and checkpoints, over all sittings.
    pub seconds: f64,
    /// `tokens / seconds`.
    pub tokens_per_s: f64,
    /// Mean loss of the validation tokens in nats.
    pub val_loss: f64,
    /// The same in bits for each byte of the validation text.
    pub val_bits_per_byte: f64,
    /// Bits a byte of a model that knows only how frequent each token is in the training text.
    pub unigram_bits_per_byte: f64,
    /// Its mean loss in nats.
    pub unigram_loss: f64,
    /// Steps done.
    pub steps: u64,
    /// Tokens a second of the steps alone, without validations and checkpoints.
    pub train_tokens_per_s: f64,
    /// Model FLOPs attained by the steps alone over `matmul_flops_per_s`, a fraction of 1.
    pub mfu: f64,
    /// The measured matmul rate that `mfu` refers to.
    pub matmul_flops_per_s: f64,
    /// What that was measured on.
    pub matmul_measured_on: String,
    /// Forward and backward FLOPs of the model for a token.
    pub flops_per_token: u64,
    /// Most memory used.
    pub max_memory_bytes: u64,
    /// Where the run computed.
    pub device: String,
    /// The compute type.
    pub dtype: String,
    /// What the sample continues.
    pub sample_prompt: String,
    /// The sample.
    pub sample: String,
}

impl Summary {
    /// Scores the unigram baseline, draws the sample and gathers the numbers of a run whose last validation is logged.
    pub(crate) fn new(trainer: &Trainer, seconds: f64) -> Result<Self> {
        let (config, estimate) = (trainer.config(), trainer.estimate());
        let unigram = Unigram::fit(trainer.train_data(), config.model.vocab_size)?.score(trainer.valid())?;
        let records = trainer.train_records();
        let tokens_per_step = trainer.tokens() / trainer.step().max(1);
        let step_seconds: f64 = records.iter().map(|record| tokens_per_step as f64 / record.tokens_per_s).sum();
        let train_tokens_per_s = (records.len() as u64 * tokens_per_step) as f64 / step_seconds.max(1e-9);
        let (val_loss, val_bits_per_byte) = trainer
            .valid_records()
            .last()
            .map_or((f64::NAN, f64::NAN), |record| (record.val_loss, record.val_bits_per_byte));
        let flops_per_token = estimate.flops_per_step as f64 / tokens_per_step.max(1) as f64;
        let prompt = &config.train.sample_prompt;
        let options = SampleOptions { seed: config.train.seed, ..SampleOptions::default() };
        let sample =
            generate(trainer.model(), trainer.tokenizer(), prompt, &options, &mut |_| ControlFlow::Continue(()))?;
        Ok(Self {
            parameters: estimate.parameters,
            tokens: trainer.tokens(),
            seconds,
            tokens_per_s: trainer.tokens() as f64 / seconds.max(1e-9),
            val_loss,
            val_bits_per_byte,
            unigram_bits_per_byte: unigram.bits_per_byte(),
            unigram_loss: unigram.nats_per_token(),
            steps: trainer.step(),
            train_tokens_per_s,
            mfu: train_tokens_per_s * flops_per_token / estimate.matmul.flops_per_s,
            matmul_flops_per_s: estimate.matmul.flops_per_s,
            matmul_measured_on: estimate.matmul.name.clone(),
            flops_per_token: estimate.flops_per_token,
            max_memory_bytes: records.iter().map(|record| record.max_memory_bytes).max().unwrap_or(0),
            device: device_name(trainer.model().device()),
            dtype: config.train.dtype.to_string(),
            sample_prompt: prompt.clone(),
            sample: sample.text,
        })
    }

    /// `summary.json`.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }
}
