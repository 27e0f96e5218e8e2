use super::{Dataset, IGNORE_TARGET, Result, Score, ValidationSet};

/// The simplest model there is: each token has a fixed probability, `(count + 1) / (total + vocab_size)` over the training
/// tokens. A model that learns anything from context scores below it.
///
/// Counts cover every target of the stream, end-of-text included; the score has the definition of the model's own.
#[derive(Debug, Clone)]
pub struct Unigram {
    counts: Vec<u64>,
    total: u64,
}

impl Unigram {
    /// Counts the tokens of a training set for a model of `vocab_size` entries.
    ///
    /// # Errors
    /// [`Error::DataVocab`](super::Error::DataVocab) where the data's vocabulary is larger than `vocab_size`.
    pub fn fit(train: &Dataset, vocab_size: usize) -> Result<Self> {
        const CHUNK: u64 = 1 << 16;
        train.check_vocab_size(vocab_size)?;
        let mut counts = vec![0u64; vocab_size];
        let mut ids = Vec::new();
        let mut start = 1;
        // The targets: everything but the first token, and the closing end-of-text.
        while start <= train.n_tokens() {
            let end = (start + CHUNK).min(train.n_tokens() + 1);
            ids.clear();
            train.tokens(start..end, &mut ids)?;
            // Ids are below the data's vocabulary, which `tokens` checks, and so below the model's.
            ids.iter().for_each(|&id| counts[id as usize] += 1);
            start = end;
        }
        Ok(Unigram { counts, total: train.n_tokens() })
    }

    /// Minus the log probability of a token, in nats.
    ///
    /// # Panics
    /// Where the id is outside the vocabulary.
    pub fn nats(&self, id: i64) -> f64 {
        let total = self.total + self.counts.len() as u64;
        (total as f64).ln() - ((self.counts[id as usize] + 1) as f64).ln()
    }

    /// Scores exactly the targets that a model is scored on.
    ///
    /// # Errors
    /// [`Error::DataVocab`](super::Error::DataVocab), and what reading can bring.
    pub fn score(&self, valid: &ValidationSet) -> Result<Score> {
        valid.dataset().check_vocab_size(self.counts.len())?;
        let mut score = Score::default();
        for batch in valid.batches() {
            let batch = batch?;
            let predicted = batch.targets.iter().filter(|&&id| id != IGNORE_TARGET);
            score.add(predicted.map(|&id| self.nats(id)).sum(), batch.n_targets, batch.text_bytes);
        }
        Ok(score)
    }
}
