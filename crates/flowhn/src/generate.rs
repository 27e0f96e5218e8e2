//! `flowhn generate`.

use std::io::Read;
use std::ops::ControlFlow;
use std::process::ExitCode;

use anyhow::{Context, Result};
use flowhn_train::generate::{SampleOptions, generate};

use crate::checkpoint_args::CheckpointArgs;
use crate::console::{self, Console};

/// Arguments of `flowhn generate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    checkpoint: CheckpointArgs,
    /// The text to continue; `-` reads it from standard input
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,
    /// Most tokens to add
    #[arg(long, value_name = "N", default_value_t = SampleOptions::default().max_tokens)]
    max_tokens: usize,
    /// Divides the logits: below 1 safer, above 1 wilder; 0 always takes the likeliest token
    #[arg(long, value_name = "T", allow_negative_numbers = true, default_value_t = SampleOptions::default().temperature)]
    temperature: f64,
    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", allow_negative_numbers = true, default_value_t = SampleOptions::default().top_p)]
    top_p: f64,
    /// The same seed gives the same text
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
}

/// Prints the continuation as it comes, without the prompt.
pub fn run(args: &Args) -> Result<ExitCode> {
    let prompt = match args.prompt.as_str() {
        "-" => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("cannot read the prompt from standard input")?;
            text
        }
        text => text.to_owned(),
    };
    let trained = args.checkpoint.load(&Console::new())?;
    let options = SampleOptions {
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
        max_tokens: args.max_tokens,
    };
    let mut written = Ok(());
    generate(&trained.model, &trained.tokenizer, &prompt, &options, &mut |piece| {
        written = console::print(piece);
        if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    written?;
    console::print("\n")?;
    Ok(ExitCode::SUCCESS)
}
