//! The loss of a model on held-out text.

mod partial;

use std::ops::ControlFlow;

use flowhn_model::Model;
use flowhn_torch::catch;
use tch::{Kind, Tensor};

use crate::Result;
use crate::batch::DeviceBatch;
use crate::data::{Batch, Score, ValidationSet};

pub use partial::TextPartial;

/// Scores every target of the validation set once: validation during training comes here.
///
/// Losses are summed in f64 on the device, which is read once, at the end.
///
/// # Errors
/// [`crate::Error::Data`] or [`crate::Error::Model`].
pub fn evaluate(model: &Model, valid: &ValidationSet, reset_documents: bool) -> Result<Score> {
    let mut score = Score::default();
    let mut nats = Tensor::zeros([], (Kind::Double, model.device()));
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
    let mut is_stopped = on_progress(partial.n_batches(), n_batches).is_break();
    for batch in text.batches_from(partial.n_batches()) {
        if is_stopped {
            partial.keep()?;
            return Ok(None);
        }
        let batch = batch?;
        let nats = nats_of(model, &batch, reset_documents)?;
        let nats = catch(|| Ok(nats.double_value(&[])))?;
        partial.add(nats, batch.n_targets, batch.text_bytes)?;
        is_stopped = on_progress(partial.n_batches(), n_batches).is_break();
    }
    Ok(Some(partial.score()))
}

/// The summed nats of a batch: a double on the model's device.
fn nats_of(model: &Model, batch: &Batch, reset_documents: bool) -> Result<Tensor> {
    let on_device = DeviceBatch::new(batch, model.device(), reset_documents)?;
    let segments = on_device.segments_bl.as_ref();
    let losses_bl = tch::no_grad(|| model.token_losses(&on_device.ids_bl, &on_device.targets_bl, segments))?;
    Ok(catch(|| Ok(losses_bl.sum(Kind::Double)))?)
}
