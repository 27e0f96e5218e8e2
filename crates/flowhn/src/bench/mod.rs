//! `flowhn bench`.

mod train;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

/// Arguments of `flowhn bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

/// What to measure.
#[derive(Debug, Subcommand)]
enum What {
    /// Training steps at the sizes of configs/bench, as a run executes them.
    Train(train::Args),
}

/// Measures.
pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.what {
        What::Train(args) => train::run(args),
    }
}
