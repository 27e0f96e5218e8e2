//! Steps as CUDA graphs: the bits of steps that run operator by operator, also after their shapes have changed.

use flowhn_model::Model;
use flowhn_torch::SideStream;
use flowhn_torch::testing::Case;
use tch::Device;

use super::small::{self, Ending, Small, tensor_bits};
use super::{ensure, on, told};
use crate::batch::DeviceBatch;
use crate::data::Batch;
use crate::optim::AdamW;
use crate::step::{CapturedStep, Outcome, compute};
use crate::trainer::{model, prepare_device};
use crate::{Result, RunConfig};

pub(super) fn cases() -> Vec<Case> {
    let variants: [(&str, &'static [&'static str]); 5] = [
        ("fp32", &["train.dtype=fp32"]),
        ("bf16", &["train.dtype=bf16"]),
        ("bf16, recomputed blocks", &["train.dtype=bf16", "train.recompute_every=2"]),
        (
            "gradients in bf16, state in int8",
            &["train.dtype=bf16", "train.grads=bf16", "train.optim_state=int8", "train.grad_accum=1"],
        ),
        ("fp8", &["train.dtype=bf16", "train.linears=fp8"]),
    ];
    let mut cases: Vec<Case> = variants
        .into_iter()
        .map(|(what, sets)| {
            let name = format!("train: a CUDA graph gives the bits of single operators, {what}");
            Case::on_cuda(name, move |device| told(graph_equals_operators(sets, device)))
        })
        .collect();
    for (what, sets) in [variants[0], variants[1], variants[4]] {
        let name = format!("train: a step is captured anew when its shapes change, {what}");
        cases.push(Case::on_cuda(name, move |device| told(shapes_change(sets, device))));
    }
    cases
}

/// Whole runs: weights, the optimiser's state and every logged loss.
fn graph_equals_operators(sets: &[&str], device: Device) -> Result<String> {
    let small = Small::new()?;
    let ending = |name: &str, cuda_graph: &str| -> Result<Ending> {
        let config = small.config(name, &[sets, &[cuda_graph]].concat())?;
        Ending::of(&small::sit(&config, &on(device))?.0)
    };
    let (graph, operators) =
        (ending("graph", "train.cuda_graph=true")?, ending("operators", "train.cuda_graph=false")?);
    let difference = graph.difference(&operators);
    ensure(difference.is_none(), || format!("{} differs", difference.unwrap_or_default()))?;
    Ok("40 steps, the same bits".to_owned())
}

/// Micro-batches and rows of steps, each often enough to be captured and replayed.
const SHAPES: [(usize, usize); 3] = [(2, 2), (1, 3), (2, 2)];
const STEPS_OF_SHAPE: usize = 5;

fn shapes_change(sets: &[&str], device: Device) -> Result<String> {
    let config = Small::new()?.config("shapes", sets)?;
    let graph = {
        let _stream = SideStream::enter(device)?;
        let mut captured = CapturedStep::new();
        losses(&config, device, |model, optimizer, batches| captured.run(model, optimizer, batches, true))?
    };
    let operators = losses(&config, device, |model, optimizer, batches| {
        let inputs = batches.iter().map(|batch| DeviceBatch::new(batch, device, true)).collect::<Result<Vec<_>>>()?;
        compute(model, optimizer, &inputs)
    })?;
    let differs = graph.iter().zip(&operators).position(|(graph, operators)| graph != operators);
    ensure(differs.is_none() && graph.len() == operators.len(), || format!("the loss of step {differs:?} differs"))?;
    Ok(format!("{} steps, the same bits", graph.len()))
}

/// The bits of the losses.
fn losses(
    config: &RunConfig,
    device: Device,
    mut step: impl FnMut(&Model, &mut AdamW, &[Batch]) -> Result<Outcome>,
) -> Result<Vec<Vec<u32>>> {
    prepare_device(device, config.train.deterministic)?;
    let model = model(config, device)?;
    let mut optimizer = AdamW::of_params(model.params(), config.train.optimizer())?;
    optimizer.set_learning_rate(5e-3)?;
    let shapes = SHAPES.into_iter().flat_map(|shape| [shape; STEPS_OF_SHAPE]);
    let losses = shapes.enumerate().map(|(idx, (n_micro_batches, n_rows))| {
        let batches: Vec<Batch> = (0..n_micro_batches).map(|i| batch(config, n_rows, 10 * idx + i)).collect();
        tensor_bits(&step(&model, &mut optimizer, &batches)?.loss)
    });
    losses.collect()
}

/// Rows of two documents each.
fn batch(config: &RunConfig, n_rows: usize, seed: usize) -> Batch {
    let (seq_len, vocab_size) = (config.model.seq_len, config.model.vocab_size);
    let n = n_rows * seq_len;
    let id = |i: usize| ((i + 31 * seed) * 7919 % vocab_size) as i64;
    Batch {
        batch_size: n_rows,
        seq_len,
        inputs: (0..n).map(id).collect(),
        targets: (1..=n).map(id).collect(),
        segments: (0..n).map(|i| i64::from(i % seq_len >= 20)).collect(),
        n_targets: n as u64,
        text_bytes: n as u64,
        rows: Vec::new(),
    }
}
