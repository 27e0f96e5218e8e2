//! `flowhn plan`.

use std::fmt::Write as _;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::builder::RangedU64ValueParser;
use flowhn_model::RecomputeEvery;
use flowhn_split::{Element, PlanReport, ScoreCount};
use flowhn_train::RunConfig;
use flowhn_train::config::Dtype;
use flowhn_train::estimate::{MemoryEstimate, StepFlops};
use serde::Serialize;

use crate::cli::policies_help;
use crate::config_args::{self, ConfigArgs};
use crate::console::{self, Console};
use crate::units::{bytes, count, spaced};

/// Arguments of `flowhn plan`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = policies_help())]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Plan for this training length instead of model.seq_len
    #[arg(long, value_name = "TOKENS", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    seq_len: Option<usize>,
    /// Print one JSON object: spans, tokens and FLOPs of each block and branch, one sequence, forward; and what a training step needs
    #[arg(long)]
    json: bool,
}

/// Prints who reads which token, and what that costs.
pub fn run(args: &Args) -> Result<ExitCode> {
    let file = &args.config.config;
    let mut sets = args.config.sets.sets.clone();
    // The balance of the branches depends on the length, so it is set before anything is derived from it.
    sets.extend(args.seq_len.map(|seq_len| format!("model.seq_len={seq_len}")));
    let config = config_args::load(file, &sets)?;
    let element = match config.train.dtype {
        Dtype::Fp32 => Element::Fp32,
        Dtype::Bf16 => Element::Bf16,
    };
    let model = &config.model;
    let mut report = PlanReport::new(&model.shape(), &model.routing()?, model.seq_len, element)
        .with_context(|| file.display().to_string())?;
    let console = Console::new();
    for warning in &report.warnings {
        console.warn(warning);
    }
    let training = training(&config, report.parameters)?;
    if args.json {
        console::print_json(&Whole { plan: &report, training })?;
    } else {
        // They went to standard error.
        report.warnings.clear();
        console::print(&format!("{report}\n{}", text(&config, &training)))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The plan with what a training step needs, as one object.
#[derive(Serialize)]
struct Whole<'a> {
    #[serde(flatten)]
    plan: &'a PlanReport,
    training: Vec<Training>,
}

/// Estimated memory and FLOPs of a training step for one choice of blocks to recompute.
#[derive(Debug, Serialize)]
struct Training {
    recompute_every: RecomputeEvery,
    memory: MemoryEstimate,
    flops_per_step: StepFlops,
}

/// Without recomputing, with all blocks recomputed, and as configured if that is neither.
fn training(config: &RunConfig, parameters: u64) -> Result<Vec<Training>> {
    let mut choices = vec![RecomputeEvery(0), RecomputeEvery(1), config.train.recompute_every];
    choices.sort_unstable();
    choices.dedup();
    let training = |recompute_every| -> Result<Training> {
        let mut config = config.clone();
        config.train.recompute_every = recompute_every;
        Ok(Training {
            recompute_every,
            memory: MemoryEstimate::new(&config.model, &config.train, parameters)?,
            flops_per_step: StepFlops::new(&config, ScoreCount::Causal)?,
        })
    };
    choices.into_iter().map(training).collect()
}

fn text(config: &RunConfig, choices: &[Training]) -> String {
    let train = &config.train;
    let mut text = format!(
        "training step of {} x {} sequences in {}, estimated; recomputed blocks trade FLOPs for memory\n",
        train.grad_accum, train.batch_size, train.dtype
    );
    for Training { recompute_every, memory, flops_per_step } in choices {
        let mark = if *recompute_every == train.recompute_every { " (configured)" } else { "" };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "  recompute_every = {}{mark}: {} ({} weights, {} gradients, {} optimiser in {}, {} activations); {}FLOP of the \
             model, {}FLOP recomputed",
            recompute_every.0,
            bytes(memory.total_bytes),
            bytes(memory.parameters_bytes),
            bytes(memory.gradients_bytes),
            bytes(memory.optimizer_bytes),
            train.optim_state,
            bytes(memory.activations_bytes),
            spaced(count(flops_per_step.model as f64)),
            spaced(count(flops_per_step.recomputed as f64)),
        );
    }
    text
}
