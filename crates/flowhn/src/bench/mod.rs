//! `flowhn bench`.

mod context;
mod decode;
mod kernels;
mod paper;
mod train;
mod train_files;

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
    /// Training over sequences of growing length, split and with attention alone.
    Context(context::Args),
    /// Inference: a prompt at once, then token by token.
    Decode(decode::Args),
    /// Every operation with a kernel, beside its floor and the best public programs.
    Kernels(kernels::Args),
    /// The paper's table: speed, training and accuracy of its ten models, beside the published numbers.
    Paper(paper::Args),
}

/// Measures.
pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.what {
        What::Train(args) => train::run(args),
        What::Context(args) => context::run(args),
        What::Decode(args) => decode::run(args),
        What::Kernels(args) => kernels::run(args),
        What::Paper(args) => paper::run(args),
    }
}
