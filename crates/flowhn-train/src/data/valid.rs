use super::batch::Row;
use super::{Batch, Dataset, Error, Result};

/// The batches of a validation run: in order, each target exactly once, with exact byte counts.
///
/// Rows are windows of `seq_len` as in training. The last one reaches back so that it is as long as the others, and
/// the targets it shares with its predecessor are [`IGNORE_TARGET`](super::IGNORE_TARGET). Only a data set shorter than
/// one window has a shorter row. The last batch may have fewer rows.
#[derive(Debug, Clone)]
pub struct ValidationSet {
    dataset: Dataset,
    seq_len: usize,
    batch_size: usize,
    n_windows: u64,
}

impl ValidationSet {
    /// Takes the whole data set, or its first `max_windows` windows.
    ///
    /// # Errors
    /// [`Error::Setting`] for a size of 0.
    pub fn new(dataset: &Dataset, seq_len: usize, batch_size: usize, max_windows: Option<u64>) -> Result<Self> {
        let sizes =
            [("seq_len", seq_len as u64), ("batch_size", batch_size as u64), ("max_windows", max_windows.unwrap_or(1))];
        if let Some((name, _)) = sizes.into_iter().find(|&(_, size)| size == 0) {
            return Err(Error::Setting { name, value: "0".to_owned(), expected: "at least 1" });
        }
        let seq_len = seq_len.min(usize::try_from(dataset.n_tokens()).unwrap_or(usize::MAX));
        let n_windows = dataset.n_tokens().div_ceil(seq_len as u64).min(max_windows.unwrap_or(u64::MAX));
        Ok(ValidationSet { dataset: dataset.clone(), seq_len, batch_size, n_windows })
    }

    /// The batches, from the start.
    pub fn batches(&self) -> impl Iterator<Item = Result<Batch>> {
        self.batches_from(0)
    }

    /// The batches without the `n_skipped` first.
    pub fn batches_from(&self, n_skipped: u64) -> impl Iterator<Item = Result<Batch>> {
        (n_skipped..self.n_batches()).map(|idx| self.batch(idx))
    }

    /// How many batches there are.
    pub fn n_batches(&self) -> u64 {
        self.n_windows.div_ceil(self.batch_size as u64)
    }

    /// Positions of a row.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Targets that are predicted.
    pub fn n_targets(&self) -> u64 {
        self.dataset.n_tokens().min(self.n_windows * self.seq_len as u64)
    }

    /// UTF-8 bytes of the text behind these targets.
    pub fn text_bytes(&self) -> u64 {
        self.dataset.bytes_behind(1..self.n_targets() + 1)
    }

    /// The data set.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    fn batch(&self, idx: u64) -> Result<Batch> {
        let first = idx * self.batch_size as u64;
        let last = self.n_windows.min(first + self.batch_size as u64);
        let mut batch = Batch::with_capacity((last - first) as usize, self.seq_len);
        for window in first..last {
            let start = window * self.seq_len as u64;
            let latest = self.dataset.n_tokens() - self.seq_len as u64;
            let n_ignored = start.saturating_sub(latest);
            let row = Row { epoch: 0, window, start: start - n_ignored };
            batch.push(&self.dataset, row, n_ignored as usize)?;
        }
        Ok(batch)
    }
}
