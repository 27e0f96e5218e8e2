//! `flowhn plan`.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::builder::RangedU64ValueParser;
use flowhn_split::{Element, PlanReport};
use flowhn_train::config::Dtype;

use crate::cli::policies_help;
use crate::config_args::{self, ConfigArgs};
use crate::console::{self, Console};

/// Arguments of `flowhn plan`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = policies_help())]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Plan for this training length instead of model.seq_len
    #[arg(long, value_name = "TOKENS", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    seq_len: Option<usize>,
    /// Print one JSON object: spans, tokens and FLOPs of each block and branch, one sequence, forward
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
    if args.json {
        console::print_json(&report)?;
    } else {
        // They went to standard error.
        report.warnings.clear();
        console::print(&report.to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}
