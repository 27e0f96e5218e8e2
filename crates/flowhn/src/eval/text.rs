//! Loss, perplexity and bits per byte of text.

use std::path::PathBuf;

use anyhow::Result;
use flowhn_train::data::{PrepareOptions, ReadOptions, ValidationSet, prepare};
use flowhn_train::eval::evaluate;
use serde::Serialize;

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
    let score = evaluate(&trained.model, &set, config.data.reset_documents)?;
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
