//! Sums on disk as they come, so that an evaluation of text which was killed goes on.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::data::Score;
use crate::storage::{Disk, write_atomically};
use crate::{Error, Result};

/// A file that says how far an evaluation of text has come.
#[derive(Debug)]
pub struct TextPartial {
    path: PathBuf,
    /// Whose the sums are.
    fingerprint: String,
    n_batches: u64,
    score: Score,
    kept_at: Instant,
}

/// The file. Sums are there to the bit, which decimal digits do not promise.
#[derive(Serialize, Deserialize)]
struct Kept {
    fingerprint: String,
    n_batches: u64,
    nats_bits: u64,
    n_targets: u64,
    text_bytes: u64,
}

impl TextPartial {
    /// Between two writes.
    const PAUSE: Duration = Duration::from_secs(2);

    /// Reads the file; begins anew where there is none, it is torn, or its sums are not of this `fingerprint`: of the same weights, dtype and
    /// device, text, and shape of batches.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if it is there and cannot be read.
    pub fn open(path: &Path, fingerprint: &str) -> Result<Self> {
        let bytes = match std::fs::read(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            read => read.map_err(Error::io(path, "read"))?,
        };
        let kept = serde_json::from_slice::<Kept>(&bytes).ok().filter(|kept| kept.fingerprint == fingerprint);
        let n_batches = kept.as_ref().map_or(0, |kept| kept.n_batches);
        let mut score = Score::default();
        if let Some(Kept { nats_bits, n_targets, text_bytes, .. }) = kept {
            score.add(f64::from_bits(nats_bits), n_targets, text_bytes);
        }
        Ok(Self {
            path: path.to_owned(),
            fingerprint: fingerprint.to_owned(),
            n_batches,
            score,
            kept_at: Instant::now(),
        })
    }

    /// Batches that are done.
    pub fn n_batches(&self) -> u64 {
        self.n_batches
    }

    /// Removes the file, once what it served for is safe elsewhere.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn remove(self) -> Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(Error::io(&self.path, "remove")),
        }
    }

    /// The sums of these.
    pub(super) fn score(&self) -> Score {
        self.score
    }

    pub(super) fn add(&mut self, nats: f64, n_targets: u64, text_bytes: u64) -> Result<()> {
        self.score.add(nats, n_targets, text_bytes);
        self.n_batches += 1;
        if self.kept_at.elapsed() < Self::PAUSE { Ok(()) } else { self.keep() }
    }

    pub(super) fn keep(&mut self) -> Result<()> {
        let Score { nats, n_targets, text_bytes } = self.score;
        let (fingerprint, n_batches) = (self.fingerprint.clone(), self.n_batches);
        let kept = Kept { fingerprint, n_batches, nats_bits: nats.to_bits(), n_targets, text_bytes };
        let text = serde_json::to_vec(&kept).map_err(|error| Error::io(&self.path, "write")(error.into()))?;
        write_atomically(&Disk, &self.path, &text)?;
        self.kept_at = Instant::now();
        Ok(())
    }
}
