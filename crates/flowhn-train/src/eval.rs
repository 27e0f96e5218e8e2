//! The loss of a model on held-out text.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flowhn_model::Model;
use flowhn_torch::catch;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::batch::DeviceBatch;
use crate::data::{Batch, Score, ValidationSet};
use crate::storage::{Disk, write_atomically};
use crate::{Error, Result};

/// Scores every target of the validation set once: validation during training comes here.
///
/// Losses are summed in f64 on the device, which is read once, at the end.
///
/// # Errors
/// [`crate::Error::Data`] or [`crate::Error::Model`].
pub fn evaluate(model: &Model, valid: &ValidationSet, reset_documents: bool) -> Result<Score> {
    let mut score = Score::default();
    let mut nats = Tensor::zeros([], (Kind::Double, model.params().device()));
    for batch in valid.batches() {
        let batch = batch?;
        let of_batch = nats_of(model, &batch, reset_documents)?;
        nats = catch(|| Ok(nats + of_batch))?;
        score.add(0., batch.n_targets, batch.text_bytes);
    }
    score.add(catch(|| Ok(nats.double_value(&[])))?, 0, 0);
    Ok(score)
}

/// As [`evaluate`], to the bit, for text that may take long: what is done is kept in a file, and `on_progress` is told how many of how many
/// batches are, those of an earlier call included. It may stop the evaluation, which then returns `None`; the next call goes on.
///
/// # Errors
/// As there; [`crate::Error::Io`].
pub fn evaluate_text(
    model: &Model,
    text: &ValidationSet,
    reset_documents: bool,
    partial: &mut TextPartial,
    on_progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Option<Score>> {
    let n_batches = text.n_batches();
    let mut is_stopped = on_progress(partial.n_batches, n_batches).is_break();
    for batch in text.batches_from(partial.n_batches) {
        if is_stopped {
            partial.keep()?;
            return Ok(None);
        }
        let batch = batch?;
        let nats = nats_of(model, &batch, reset_documents)?;
        let nats = catch(|| Ok(nats.double_value(&[])))?;
        partial.add(nats, batch.n_targets, batch.text_bytes)?;
        is_stopped = on_progress(partial.n_batches, n_batches).is_break();
    }
    Ok(Some(partial.score))
}

/// The summed nats of a batch: a double on the model's device.
fn nats_of(model: &Model, batch: &Batch, reset_documents: bool) -> Result<Tensor> {
    let device: Device = model.params().device();
    let on_device = DeviceBatch::new(batch, device, reset_documents)?;
    let segments = on_device.segments_bl.as_ref();
    let losses_bl = tch::no_grad(|| model.token_losses(&on_device.ids_bl, &on_device.targets_bl, segments))?;
    Ok(catch(|| Ok(losses_bl.sum(Kind::Double)))?)
}

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

    fn add(&mut self, nats: f64, n_targets: u64, text_bytes: u64) -> Result<()> {
        self.score.add(nats, n_targets, text_bytes);
        self.n_batches += 1;
        if self.kept_at.elapsed() < Self::PAUSE { Ok(()) } else { self.keep() }
    }

    fn keep(&mut self) -> Result<()> {
        let Score { nats, n_targets, text_bytes } = self.score;
        let (fingerprint, n_batches) = (self.fingerprint.clone(), self.n_batches);
        let kept = Kept { fingerprint, n_batches, nats_bits: nats.to_bits(), n_targets, text_bytes };
        let text = serde_json::to_vec(&kept).map_err(|error| Error::io(&self.path, "write")(error.into()))?;
        write_atomically(&Disk, &self.path, &text)?;
        self.kept_at = Instant::now();
        Ok(())
    }
}
