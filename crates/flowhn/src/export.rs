//! `flowhn export`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use flowhn_model::Model;
use flowhn_train::checkpoint;
use flowhn_train::hf::export;
use flowhn_train::run_dir::TOKENIZER;
use tch::Device;

use crate::console::{self, Console};

/// Arguments of `flowhn export`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A run's directory, its checkpoints directory, or one step-N in there
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// The directory to write config.json and model.safetensors to
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
}

/// Writes a checkpoint as transformers reads it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let console = Console::new();
    let latest = checkpoint::resolve(&args.checkpoint)?;
    for skipped in &latest.skipped {
        console.warn(format_args!("{skipped}"));
    }
    let checkpoint = latest.checkpoint.ok_or_else(|| anyhow!("{}: no usable checkpoint", args.checkpoint.display()))?;
    let config = checkpoint.config()?;
    let model = Model::new(&config.model, Device::Cpu, 0)?;
    checkpoint.load_into(model.params())?;
    let full = checkpoint.path().canonicalize()?;
    let copy = full.ancestors().nth(2).map(|run| run.join(TOKENIZER)).filter(|copy| copy.is_file());
    let tokenizer = copy.unwrap_or(config.data.tokenizer);
    let exported = export(&model, Some(&tokenizer), &args.to)?;
    for warning in &exported.warnings {
        console.warn(warning);
    }
    console::print(&format!("{}: a {:?} model for transformers\n", args.to.display(), exported.family))?;
    Ok(ExitCode::SUCCESS)
}
