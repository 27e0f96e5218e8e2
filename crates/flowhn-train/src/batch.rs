//! Batches on the device.

use flowhn_torch::catch;
use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::data::Batch;

/// A batch as the model takes it.
#[derive(Debug)]
pub(crate) struct DeviceBatch {
    /// `[batch, seq_len]`, i64.
    pub(crate) ids_bl: Tensor,
    /// `[batch, seq_len]`, i64.
    pub(crate) targets_bl: Tensor,
    /// `[batch, seq_len]`, i64; `None` where documents are not kept apart.
    pub(crate) segments_bl: Option<Tensor>,
}

impl DeviceBatch {
    /// Copies a batch to the device.
    pub(crate) fn new(batch: &Batch, device: Device, reset_documents: bool) -> Result<Self> {
        let shape = [batch.batch_size as i64, batch.seq_len as i64];
        // From pinned memory the copy runs beside the host, which goes on to launch the step's work.
        let copy = |values: &[i64]| match device {
            Device::Cuda(_) => {
                let pinned = Tensor::from_slice(values).view(shape).pin_memory(device);
                pinned.to_device_(device, Kind::Int64, true, false)
            }
            _ => Tensor::from_slice(values).view(shape).to_device(device),
        };
        Ok(catch(|| {
            Ok(Self {
                ids_bl: copy(&batch.inputs),
                targets_bl: copy(&batch.targets),
                segments_bl: reset_documents.then(|| copy(&batch.segments)),
            })
        })?)
    }
}
