//! What a run writes down while it trains: `metrics.jsonl`, `validation.jsonl` and TensorBoard events.
//!
//! `metrics.jsonl` has one object a step, with the fields of [`StepRecord`] and no others; validations go to
//! `validation.jsonl` with the fields of [`ValidRecord`]. A resumed run first cuts both back to the step of its checkpoint,
//! so the lines of an interrupted run are those of an uninterrupted one: step, tokens, loss, lr and grad_norm to the last
//! bit, the times and rates as they were.

mod log;
mod tensorboard;

use serde::{Deserialize, Serialize};

pub use log::{Log, read};
pub use tensorboard::EventWriter;

/// A line of a log that belongs to a step.
pub trait Record: Serialize + serde::de::DeserializeOwned {
    /// The steps done when the line was written, from 1.
    fn step(&self) -> u64;
    /// Name and value of what TensorBoard shows.
    fn scalars(&self) -> Vec<(&'static str, f32)>;
}

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepRecord {
    /// Steps done, this one included.
    pub step: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Mean loss of the step's tokens in nats, before its update.
    pub loss: f32,
    /// Learning rate of the update.
    pub lr: f64,
    /// Global L2 norm of the gradient before clipping.
    pub grad_norm: f32,
    /// Trained tokens a second, over the steps since the last reading of the device.
    pub tokens_per_s: f64,
    /// Model FLOPs attained over the measured matmul rate of the device, a fraction of 1, over the same steps.
    pub mfu: f64,
    /// Most memory so far: tensors on a CUDA device, the process's resident set on the CPU.
    pub max_memory_bytes: u64,
    /// Seconds in the training loop, over all sittings.
    pub elapsed_s: f64,
}

/// A line of `validation.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidRecord {
    /// Steps done; 0 for the model before its first update.
    pub step: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Mean loss of the validation tokens in nats.
    pub val_loss: f64,
    /// The same in bits for each byte of the validation text.
    pub val_bits_per_byte: f64,
    /// Seconds in the training loop, over all sittings.
    pub elapsed_s: f64,
}

impl Record for StepRecord {
    fn step(&self) -> u64 {
        self.step
    }

    fn scalars(&self) -> Vec<(&'static str, f32)> {
        vec![
            ("train/loss", self.loss),
            ("train/grad_norm", self.grad_norm),
            ("train/lr", self.lr as f32),
            ("speed/tokens_per_s", self.tokens_per_s as f32),
            ("speed/mfu", self.mfu as f32),
            ("memory/max_bytes", self.max_memory_bytes as f32),
        ]
    }
}

impl Record for ValidRecord {
    fn step(&self) -> u64 {
        self.step
    }

    fn scalars(&self) -> Vec<(&'static str, f32)> {
        vec![("valid/loss", self.val_loss as f32), ("valid/bits_per_byte", self.val_bits_per_byte as f32)]
    }
}
