//! `flowhn data`.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use flowhn_train::data::{Dataset, PrepareOptions, ReadOptions, Tokenizer, prepare, train_tokenizer};
use flowhn_train::tasks::sample_items;

use crate::config_args::ConfigArgs;
use crate::console::{self, Console};
use crate::shards::ShardProgress;
use crate::units::{bytes, grouped};

/// Arguments of `flowhn data`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a vocabulary for text: a byte-level BPE in the tokenizer.json format.
    Tokenizer(TokenizerArgs),
    /// Make the token shards of a configuration ahead of training.
    Build(ConfigArgs),
    /// Draw a small part of files of evaluation items, as data/eval was.
    Sample(SampleArgs),
}

#[derive(Debug, clap::Args)]
struct SampleArgs {
    /// Files of items: .jsonl, .jsonl.gz or .jsonl.zst
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    input: Vec<PathBuf>,
    /// Items to draw of each file
    #[arg(long, value_name = "N", default_value_t = 100)]
    items: usize,
    /// Seed of the draw
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// The folder that gets a .jsonl.gz file for each
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Debug, clap::Args)]
struct TokenizerArgs {
    /// Text: .jsonl, .jsonl.zst, .txt or .txt.zst
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    input: Vec<PathBuf>,
    /// Entries of the vocabulary, at least 257: 256 bytes and end-of-text
    #[arg(long, value_name = "N")]
    vocab_size: usize,
    /// Where to write it
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Runs one of them.
pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.command {
        Command::Tokenizer(args) => tokenizer(args)?,
        Command::Build(args) => build(args)?,
        Command::Sample(args) => sample(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn tokenizer(args: &TokenizerArgs) -> Result<()> {
    let console = Console::new();
    console.line("counting pairs; this reads all of the text");
    let trained = train_tokenizer(&args.input, args.vocab_size, &args.out, &ReadOptions::default())?;
    if trained.vocab_size < args.vocab_size {
        console.warn(format_args!(
            "{} entries instead of {}: the text has no more pairs that occur twice",
            grouped(trained.vocab_size as u64),
            grouped(args.vocab_size as u64),
        ));
    }
    console::print(&format!(
        "{}: {} entries, from {} documents, {} of text\n",
        args.out.display(),
        grouped(trained.vocab_size as u64),
        grouped(trained.n_documents),
        bytes(trained.text_bytes),
    ))
}

fn sample(args: &SampleArgs) -> Result<()> {
    fs::create_dir_all(&args.out).with_context(|| format!("{}: cannot be made", args.out.display()))?;
    for input in &args.input {
        let name = input.file_name().unwrap_or_default().to_string_lossy();
        let stem = name.split_once(".jsonl").map_or(&*name, |(stem, _)| stem);
        let out = args.out.join(format!("{stem}.jsonl.gz"));
        let n_items = sample_items(input, args.items, args.seed, &out)?;
        console::print(&format!("{}: {} of {n_items} items\n", out.display(), args.items.min(n_items)))?;
    }
    Ok(())
}

fn build(args: &ConfigArgs) -> Result<()> {
    let config = args.load()?;
    let section = &config.data;
    if section.tokenizer.as_os_str().is_empty() {
        bail!("{}: data.tokenizer is empty: name the tokenizer's file", args.config.display());
    }
    let console = Console::new();
    let tokenizer = Tokenizer::load(&section.tokenizer)?;
    tokenizer.check_vocab_size(config.model.vocab_size)?;
    let options = PrepareOptions { cache_dir: section.cache_dir.clone(), read: ReadOptions::default() };
    let make = |files: &[PathBuf]| -> Result<Dataset> {
        let shards = ShardProgress::new(&console);
        Ok(prepare(files, &tokenizer, &options, &shards)?)
    };
    let train = make(&section.train)?;
    let (train, valid) = match (section.valid.is_empty(), section.valid_frac) {
        (true, 0.) => (train, None),
        (true, frac) => train.split(frac).map(|(train, valid)| (train, Some(valid)))?,
        (false, _) => (train, Some(make(&section.valid)?)),
    };
    let line = |name: &str, data: &Dataset| {
        format!(
            "{name:<10} {:>15} tokens {:>12} documents {:>10} of text\n",
            grouped(data.n_tokens()),
            grouped(data.n_documents()),
            bytes(data.text_bytes()),
        )
    };
    let mut text = line("training", &train);
    text += &valid.map(|valid| line("validation", &valid)).unwrap_or_default();
    console::print(&format!("{text}shards in {}\n", section.cache_dir.display()))
}
