//! The loss of a model on held-out text.

use flowhn_model::Model;
use flowhn_torch::catch;
use tch::{Kind, Tensor};

use crate::Result;
use crate::batch::DeviceBatch;
use crate::data::{Score, ValidationSet};

/// Scores every target of the validation set once: validation during training and the `eval` command both come here.
///
/// Losses are summed in f64 on the device, which is read once, at the end.
///
/// # Errors
/// [`crate::Error::Data`] or [`crate::Error::Model`].
pub fn evaluate(model: &Model, valid: &ValidationSet, reset_documents: bool) -> Result<Score> {
    let device = model.params().device();
    let (mut n_targets, mut text_bytes) = (0, 0);
    let mut nats = Tensor::zeros([], (Kind::Double, device));
    for batch in valid.batches() {
        let batch = batch?;
        let on_device = DeviceBatch::new(&batch, device, reset_documents)?;
        let segments = on_device.segments_bl.as_ref();
        let losses_bl = tch::no_grad(|| model.token_losses(&on_device.ids_bl, &on_device.targets_bl, segments))?;
        nats = catch(|| Ok(nats + losses_bl.sum(Kind::Double)))?;
        n_targets += batch.n_targets;
        text_bytes += batch.text_bytes;
    }
    let mut score = Score::default();
    score.add(catch(|| Ok(nats.double_value(&[])))?, n_targets, text_bytes);
    Ok(score)
}
