use super::batch::Row;
use super::{Batch, Dataset, Error, Result};

/// A data set cut into windows of `seq_len` targets, without padding.
///
/// Window `w` reads the tokens at `w * seq_len ..= (w + 1) * seq_len`; every target belongs to exactly one window. What
/// does not fill a window at the end of the stream is unused: fewer than `seq_len` tokens, see
/// [`n_unused`](Windows::n_unused).
#[derive(Debug, Clone)]
pub struct Windows {
    dataset: Dataset,
    seq_len: usize,
}

impl Windows {
    /// Cuts a data set.
    ///
    /// # Errors
    /// [`Error::Setting`] for a `seq_len` of 0, [`Error::TooShort`] where there is not one window.
    pub fn new(dataset: &Dataset, seq_len: usize) -> Result<Self> {
        if seq_len == 0 {
            return Err(Error::Setting { name: "seq_len", value: "0".to_owned(), expected: "at least 1" });
        }
        if dataset.n_tokens() < seq_len as u64 {
            return Err(Error::TooShort { n_tokens: dataset.n_tokens(), seq_len });
        }
        Ok(Windows { dataset: dataset.clone(), seq_len })
    }

    /// How many there are.
    pub fn n_windows(&self) -> u64 {
        self.dataset.n_tokens() / self.seq_len as u64
    }

    /// Targets of a window.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Targets at the end of the stream that no window holds.
    pub fn n_unused(&self) -> u64 {
        self.dataset.n_tokens() % self.seq_len as u64
    }

    /// The data set.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// The windows with some `(epoch, window)` numbers as one batch.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`] where a shard was changed after it was opened.
    ///
    /// # Panics
    /// Where a window is not below `n_windows()`.
    pub fn batch(&self, windows: &[(u64, u64)]) -> Result<Batch> {
        let mut batch = Batch::with_capacity(windows.len(), self.seq_len);
        for &(epoch, window) in windows {
            assert!(window < self.n_windows(), "window {window} of {}", self.n_windows());
            let row = Row { epoch, window, start: window * self.seq_len as u64 };
            batch.push(&self.dataset, row, 0)?;
        }
        Ok(batch)
    }
}
