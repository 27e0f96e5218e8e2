//! `flowhn bench`.

mod kernels;
mod paper;
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
    /// Every operation with a kernel, beside its floor and the best public programs.
    Kernels(kernels::Args),
    /// The paper's table: speed, training and accuracy of its ten models, beside the published numbers.
    Paper(paper::Args),
}

/// Measures.
pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.what {
        What::Train(args) => train::run(args),
        What::Kernels(args) => kernels::run(args),
        What::Paper(args) => paper::run(args),
    }
}
