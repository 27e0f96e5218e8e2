//! `flowhn eval`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use flowhn_train::data::{PrepareOptions, ReadOptions, ValidationSet, prepare};
use flowhn_train::eval::evaluate;
use serde::Serialize;

use crate::checkpoint_args::CheckpointArgs;
use crate::console::{self, Console};
use crate::shards::ShardProgress;
use crate::units::grouped;

/// Arguments of `flowhn eval`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    checkpoint: CheckpointArgs,
    /// Text to score: .jsonl, .jsonl.zst, .txt or .txt.zst; may be repeated
    #[arg(long, required = true, value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The object of `eval --json`.
#[derive(Debug, Serialize)]
struct Report {
    /// The checkpoint's directory.
    checkpoint: String,
    /// Steps it was trained for.
    step: u64,
    /// The files scored.
    data: Vec<String>,
    /// Tokens predicted, each once.
    tokens: u64,
    /// Bytes of their text.
    bytes: u64,
    /// Mean loss in nats a token.
    loss: f64,
    /// The same in bits a byte of text.
    bits_per_byte: f64,
    /// Tokens the model sees at once: the training length.
    seq_len: usize,
    /// The length for which the tokens were routed: `training` or, in the script's own form, `actual`.
    plan: &'static str,
}

/// Scores every token of the text once.
pub fn run(args: &Args) -> Result<ExitCode> {
    let console = Console::new();
    let trained = args.checkpoint.load(&console)?;
    let config = &trained.config;
    let options = PrepareOptions { cache_dir: config.data.cache_dir.clone(), read: ReadOptions::default() };
    let shards = ShardProgress::new(&console);
    let dataset = prepare(&args.data, &trained.tokenizer, &options, &shards)?;
    drop(shards);
    let set = ValidationSet::new(&dataset, config.model.seq_len, config.train.batch_size, None)?;
    let score = evaluate(&trained.model, &set, config.data.reset_documents)?;
    let report = Report {
        checkpoint: trained.checkpoint.path().display().to_string(),
        step: trained.checkpoint.progress().step,
        data: args.data.iter().map(|file| file.display().to_string()).collect(),
        tokens: set.n_targets(),
        bytes: set.text_bytes(),
        loss: score.nats_per_token(),
        bits_per_byte: score.bits_per_byte(),
        seq_len: config.model.seq_len,
        plan: if config.model.split.released { "actual" } else { "training" },
    };
    if args.json {
        console::print_json(&report)?;
    } else {
        console::print(&format!(
            "{} after {} steps, on {}\n{:.4} nats/token, {:.4} bits/byte ({} tokens, {} bytes of text; {} tokens at once, \
             routed by the plan of the {} length)\n",
            report.checkpoint,
            grouped(report.step),
            report.data.join(", "),
            report.loss,
            report.bits_per_byte,
            grouped(report.tokens),
            grouped(report.bytes),
            report.seq_len,
            report.plan,
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
