//! Loss, perplexity and bits per byte of text.

use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Context, Result};
use flowhn_train::data::{PrepareOptions, ReadOptions, ValidationSet, prepare};
use flowhn_train::eval::{TextPartial, evaluate_text};
use serde::Serialize;

use super::progress::EvalProgress;
use super::tasks::fingerprint;
use crate::checkpoint_args::Trained;
use crate::console::Console;
use crate::shards::ShardProgress;
use crate::units::grouped;

/// The part of `eval --json` that speaks of text.
#[derive(Debug, Serialize)]
pub struct TextReport {
    /// The files scored.
    data: Vec<String>,
    /// Tokens predicted, each once.
    tokens: u64,
    /// Bytes of their text.
    bytes: u64,
    /// Mean loss in nats a token.
    loss: f64,
    /// `exp` of it.
    perplexity: f64,
    /// The loss in bits a byte of text, which compares models of different tokenizers.
    bits_per_byte: f64,
}

/// Scores every token of the files once.
pub fn score(files: &[PathBuf], trained: &Trained, console: &Console) -> Result<TextReport> {
    let config = &trained.config;
    let options = PrepareOptions { cache_dir: config.data.cache_dir.clone(), read: ReadOptions::default() };
    let shards = ShardProgress::new(console);
    let dataset = prepare(files, &trained.tokenizer, &options, &shards)?;
    drop(shards);
    let set = ValidationSet::new(&dataset, config.model.seq_len, config.train.batch_size, None)?;
    let fingerprint = format!(
        "{} {} {} {} {}",
        fingerprint(trained),
        dataset.fingerprint(),
        set.seq_len(),
        config.train.batch_size,
        config.data.reset_documents
    );
    // Beside the token shards, which are no more than a cache either.
    let name = format!("eval-{}-{}.partial", trained.checkpoint.weights_hash(), dataset.fingerprint());
    let mut partial = TextPartial::open(&config.data.cache_dir.join(name), &fingerprint)?;
    if partial.n_batches() > 0 {
        console.line(format_args!("going on with an evaluation that was interrupted"));
    }
    let mut progress = EvalProgress::new(console, "batches");
    let score = evaluate_text(&trained.model, &set, config.data.reset_documents, &mut partial, &mut |done, all| {
        progress.report(done, all);
        ControlFlow::Continue(())
    })?;
    drop(progress);
    let score = score.context("the evaluation was stopped")?;
    partial.remove()?;
    Ok(TextReport {
        data: files.iter().map(|file| file.display().to_string()).collect(),
        tokens: set.n_targets(),
        bytes: set.text_bytes(),
        loss: score.nats_per_token(),
        perplexity: score.nats_per_token().exp(),
        bits_per_byte: score.bits_per_byte(),
    })
}

impl TextReport {
    /// The end of the line that names the checkpoint, and the numbers.
    pub fn told(&self, seq_len: usize, plan: &str) -> String {
        format!(
            ", on {}\n{:.4} nats/token, {:.4} bits/byte, perplexity {:.2} ({} tokens, {} bytes of text; {seq_len} tokens at once, routed \
             by the plan of the {plan} length)",
            self.data.join(", "),
            self.loss,
            self.bits_per_byte,
            self.perplexity,
            grouped(self.tokens),
            grouped(self.bytes),
        )
    }
}
