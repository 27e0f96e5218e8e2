use super::{Dataset, Result};

/// The target of a position that is not predicted, as in libtorch's cross-entropy.
pub const IGNORE_TARGET: i64 = -100;

/// Sequences for one step, on the host, row after row (`[batch_size, seq_len]`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Rows.
    pub batch_size: usize,
    /// Positions of a row.
    pub seq_len: usize,
    /// Token ids, `batch_size * seq_len` of them.
    pub inputs: Vec<i64>,
    /// The token after each input, or [`IGNORE_TARGET`]. Training batches ignore none.
    pub targets: Vec<i64>,
    /// The document of each input, counted from 0 in every row; rises by one at each end-of-text that opens a document.
    pub segments: Vec<i64>,
    /// Targets that are not ignored.
    pub n_targets: u64,
    /// UTF-8 bytes of text behind the targets that are not ignored.
    pub text_bytes: u64,
    /// Where each row comes from.
    pub rows: Vec<Row>,
}

/// Where a row of a batch comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The pass over the data, from 0; 0 in validation.
    pub epoch: u64,
    /// The window.
    pub window: u64,
    /// The position of its first input in the token stream.
    pub start: u64,
}

impl Batch {
    pub(super) fn with_capacity(batch_size: usize, seq_len: usize) -> Self {
        let n = batch_size * seq_len;
        Batch {
            batch_size: 0,
            seq_len,
            inputs: Vec::with_capacity(n),
            targets: Vec::with_capacity(n),
            segments: Vec::with_capacity(n),
            n_targets: 0,
            text_bytes: 0,
            rows: Vec::with_capacity(batch_size),
        }
    }

    /// Adds the row whose first input is at `row.start`, of which the first `n_ignored` targets are not predicted.
    pub(super) fn push(&mut self, dataset: &Dataset, row: Row, n_ignored: usize) -> Result<()> {
        let (start, end) = (row.start, row.start + self.seq_len as u64);
        let mut ids = Vec::with_capacity(self.seq_len + 1);
        dataset.tokens(start..end + 1, &mut ids)?;
        self.inputs.extend_from_slice(&ids[..self.seq_len]);
        self.targets.extend(std::iter::repeat_n(IGNORE_TARGET, n_ignored));
        self.targets.extend_from_slice(&ids[1 + n_ignored..]);

        let mut borders = dataset.document_starts(start + 1..end).into_iter().peekable();
        let mut segment = 0;
        self.segments.extend((start..end).map(|position| {
            segment += i64::from(borders.next_if_eq(&position).is_some());
            segment
        }));
        self.n_targets += (self.seq_len - n_ignored) as u64;
        self.text_bytes += dataset.bytes_behind(start + 1 + n_ignored as u64..end + 1);
        self.rows.push(row);
        self.batch_size += 1;
        Ok(())
    }
}
