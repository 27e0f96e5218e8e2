//! The training step.

mod captured;

use flowhn_model::{Model, parts};
use flowhn_torch::{catch, timeline};
use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::batch::DeviceBatch;
use crate::data::{Batch, TrainLoader};
use crate::optim::AdamW;
use crate::schedule::LearningRate;

pub(crate) use captured::CapturedStep;

/// The part of a step that clips and updates.
const OPTIMIZER: &str = "optimizer";

/// What takes part in a step. Nothing in it waits for the device.
pub(crate) struct Stepper {
    pub(crate) model: Model,
    pub(crate) optimizer: AdamW,
    pub(crate) loader: TrainLoader,
    pub(crate) learning_rate: LearningRate,
    pub(crate) grad_accum: usize,
    pub(crate) reset_documents: bool,
    /// The step as one CUDA graph, where it is to be one.
    pub(crate) captured: Option<CapturedStep>,
    /// Steps done.
    pub(crate) step: u64,
    /// Steps whose loss and norm have not been read.
    pub(crate) unread: Vec<Unread>,
}

/// A step's outcome, still on the device.
pub(crate) struct Unread {
    step: u64,
    lr: f64,
    outcome: Outcome,
    batches: Vec<Batch>,
}

/// A step's outcome, on the host.
pub(crate) struct ReadStep {
    /// Steps done with it.
    pub(crate) step: u64,
    pub(crate) lr: f64,
    pub(crate) loss: f32,
    pub(crate) grad_norm: f32,
    /// Its micro-batches without their tokens: where their rows come from.
    pub(crate) batches: Vec<Batch>,
}

/// The mean loss of a step and the norm of its gradient: f32 scalars on the device.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) loss: Tensor,
    grad_norm: Tensor,
}

impl Stepper {
    /// One update: micro-batches forward and backward, clip, AdamW.
    pub(crate) fn train_step(&mut self) -> Result<()> {
        let lr = self.learning_rate.at(self.step);
        let batches = (0..self.grad_accum).map(|_| Ok(self.loader.next_batch()?)).collect::<Result<Vec<Batch>>>()?;
        self.optimizer.set_learning_rate(lr)?;
        let (device, reset_documents) = (self.device(), self.reset_documents);
        let outcome = match &mut self.captured {
            Some(captured) => captured.run(&self.model, &mut self.optimizer, &batches, reset_documents)?,
            None => {
                let on_device = batches.iter().map(|batch| DeviceBatch::new(batch, device, reset_documents));
                compute(&self.model, &mut self.optimizer, &on_device.collect::<Result<Vec<_>>>()?)?
            }
        };
        self.step += 1;
        let batches = batches.into_iter().map(without_tokens).collect();
        self.unread.push(Unread { step: self.step, lr, outcome, batches });
        Ok(())
    }

    /// The unread steps, in order, read from the device at once.
    pub(crate) fn read(&mut self) -> Result<Vec<ReadStep>> {
        let unread = std::mem::take(&mut self.unread);
        if unread.is_empty() {
            return Ok(Vec::new());
        }
        let on_device: Vec<&Tensor> =
            unread.iter().flat_map(|step| [&step.outcome.loss, &step.outcome.grad_norm]).collect();
        let values: Vec<f32> = catch(|| Ok(Vec::try_from(Tensor::stack(&on_device, 0).to_device(Device::Cpu))?))?;
        let read = unread.into_iter().zip(values.chunks_exact(2)).map(|(unread, values)| {
            let Unread { step, lr, batches, .. } = unread;
            ReadStep { step, lr, loss: values[0], grad_norm: values[1], batches }
        });
        Ok(read.collect())
    }

    /// Tokens of a step.
    pub(crate) fn tokens_per_step(&self, batch_size: usize) -> u64 {
        (batch_size * self.grad_accum * self.model.config().seq_len) as u64
    }

    pub(crate) fn device(&self) -> Device {
        self.model.device()
    }
}

/// What the device does in a step: forward and backward of every micro-batch, clip, AdamW.
///
/// Every micro-batch has the same number of targets, so the mean of their means is the mean over the step.
pub(crate) fn compute(model: &Model, optimizer: &mut AdamW, micro_batches: &[DeviceBatch]) -> Result<Outcome> {
    timeline::begin(parts::EMBEDDING)?;
    let mut loss = Tensor::zeros([], (Kind::Float, model.device()));
    optimizer.zero_grad()?;
    model.begin_step()?;
    for DeviceBatch { ids_bl, targets_bl, segments_bl } in micro_batches {
        let share = model.backward(ids_bl, targets_bl, segments_bl.as_ref(), micro_batches.len())?;
        loss = catch(|| Ok(loss.f_add(&share)?))?;
    }
    timeline::mark(OPTIMIZER)?;
    let grad_norm = optimizer.clip_and_update()?;
    timeline::end()?;
    Ok(Outcome { loss, grad_norm })
}

fn without_tokens(batch: Batch) -> Batch {
    Batch { inputs: Vec::new(), targets: Vec::new(), segments: Vec::new(), ..batch }
}
