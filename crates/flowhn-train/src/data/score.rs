use std::f64::consts::LN_2;

/// Sums from which loss per token and per byte follow; the same for a model and for the unigram baseline.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Score {
    /// Negative log-likelihood of the predicted tokens, in nats.
    pub nats: f64,
    /// Predicted tokens, end-of-text included.
    pub n_targets: u64,
    /// UTF-8 bytes of the text behind them.
    pub text_bytes: u64,
}

impl Score {
    /// Adds the summed (not averaged) nats of a batch, with its `n_targets` and `text_bytes`.
    pub fn add(&mut self, nats: f64, n_targets: u64, text_bytes: u64) {
        self.nats += nats;
        self.n_targets += n_targets;
        self.text_bytes += text_bytes;
    }

    /// Mean loss in nats; NaN before anything was added.
    pub fn nats_per_token(&self) -> f64 {
        self.nats / self.n_targets as f64
    }

    /// All nats in bits over all bytes of text, see [the module](super); NaN before anything was added.
    ///
    /// ```
    /// let mut score = flowhn_train::data::Score::default();
    /// score.add(8.0 * std::f64::consts::LN_2, 2, 4);
    /// assert_eq!(score.bits_per_byte(), 2.0);
    /// ```
    pub fn bits_per_byte(&self) -> f64 {
        self.nats / LN_2 / self.text_bytes as f64
    }
}
