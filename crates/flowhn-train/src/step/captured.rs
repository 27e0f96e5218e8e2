//! The step as one CUDA graph: the host hands over a batch and starts it, and the device never waits for a launch.

use flowhn_model::Model;
use flowhn_torch::{CaptureMode, Graph, MemoryStats, catch};
use tch::Device;

use super::{Outcome, compute};
use crate::batch::DeviceBatch;
use crate::data::Batch;
use crate::optim::AdamW;
use crate::{Error, Result};

/// Steps that run operator by operator before one is captured: kernels are compiled, plans and index tensors made, and libtorch's
/// libraries have their workspaces.
const WARM_UP: u32 = 2;

/// A step that is captured once it has run a few times, and anew when its shapes change.
#[derive(Debug)]
pub(crate) struct CapturedStep {
    n_warm: u32,
    captured: Option<Captured>,
}

#[derive(Debug)]
struct Captured {
    graph: Graph,
    /// What the graph reads.
    inputs: Vec<DeviceBatch>,
    /// What the graph writes.
    outcome: Outcome,
}

impl CapturedStep {
    /// A step that has not run yet. All its work, and all other work on the model, belongs into one stream that is not the default.
    pub(crate) fn new() -> Self {
        Self { n_warm: 0, captured: None }
    }

    /// Runs a step on these micro-batches. Captured or not, the bits of its results are the same.
    pub(crate) fn run(
        &mut self,
        model: &Model,
        optimizer: &mut AdamW,
        batches: &[Batch],
        reset_documents: bool,
    ) -> Result<Outcome> {
        // Neither a capture nor a replay looks at whether a weight's bf16 copy is up to date.
        model.refresh_bf16_copies()?;
        if self.captured.as_ref().is_some_and(|captured| !captured.fits(batches, reset_documents)) {
            *self = Self::new();
        }
        if let Some(captured) = &mut self.captured {
            for (input, batch) in captured.inputs.iter_mut().zip(batches) {
                input.overwrite(batch)?;
            }
            return captured.replay(optimizer);
        }
        let on_device = |batch| DeviceBatch::new(batch, model.device(), reset_documents);
        let inputs = batches.iter().map(on_device).collect::<Result<Vec<_>>>()?;
        if self.n_warm < WARM_UP {
            self.n_warm += 1;
            return compute(model, optimizer, &inputs);
        }
        self.captured.insert(Captured::new(model, optimizer, inputs)?).replay(optimizer)
    }
}

impl Captured {
    fn new(model: &Model, optimizer: &mut AdamW, inputs: Vec<DeviceBatch>) -> Result<Self> {
        // The graph has memory of its own; what the steps before it left in the cache would be held twice.
        if let Device::Cuda(_) = model.device() {
            MemoryStats::empty_cache()?;
        }
        let mut graph = Graph::new()?;
        match graph.try_capture(None, CaptureMode::ThreadLocal, || compute(model, optimizer, &inputs)) {
            Ok(outcome) => Ok(Self { outcome: outcome?, graph, inputs }),
            Err(error) => {
                let want = "the step cannot be captured on this device; false runs it operator by operator";
                Err(Error::setting("train.cuda_graph", true, format!("{error}: {want}")))
            }
        }
    }

    /// Whether these micro-batches have the shapes of those that were captured.
    fn fits(&self, batches: &[Batch], reset_documents: bool) -> bool {
        let same = |(input, batch): (&DeviceBatch, &Batch)| input.fits(batch, reset_documents);
        self.inputs.len() == batches.len() && self.inputs.iter().zip(batches).all(same)
    }

    /// Enqueues the graph. The next replay overwrites what it wrote, so the outcome is copied.
    fn replay(&self, optimizer: &AdamW) -> Result<Outcome> {
        self.graph.replay()?;
        optimizer.mark_updated()?;
        let Outcome { loss, grad_norm } = &self.outcome;
        Ok(catch(|| Ok(Outcome { loss: loss.copy(), grad_norm: grad_norm.copy() }))?)
    }
}
