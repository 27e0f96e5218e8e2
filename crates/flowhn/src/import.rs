//! `flowhn import`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::builder::RangedU64ValueParser;
use flowhn_train::hf::{ImportOptions, import};

use crate::console::{self, Console};
use crate::units;

/// Arguments of `flowhn import`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A directory as transformers writes it: config.json and model.safetensors, or shards with their index
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// The run's directory to make; by default runs/ and the name of the other
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Plan for sequences of so many tokens; by default max_position_embeddings of config.json, at most 8192
    #[arg(long, value_name = "TOKENS", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    seq_len: Option<usize>,
    /// The tokenizer, where it is not in the directory
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
}

/// Makes a run's directory that `eval`, `generate` and `export` take.
pub fn run(args: &Args) -> Result<ExitCode> {
    let to = match &args.out {
        Some(out) => out.clone(),
        None => {
            let full = args.from.canonicalize().with_context(|| args.from.display().to_string())?;
            let Some(name) = full.file_name() else { bail!("{}: name the run with --out", full.display()) };
            PathBuf::from("runs").join(name)
        }
    };
    let options =
        ImportOptions { from: args.from.clone(), to, seq_len: args.seq_len, tokenizer: args.tokenizer.clone() };
    let imported = import(&options)?;
    let console = Console::new();
    for warning in &imported.warnings {
        console.warn(warning);
    }
    let (checkpoint, parameters) = (imported.checkpoint.display(), units::grouped(imported.parameters));
    console::print(&format!("{checkpoint}: a {:?} model of {parameters} parameters\n", imported.family))?;
    Ok(ExitCode::SUCCESS)
}
