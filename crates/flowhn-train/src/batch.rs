//! Batches on the device.

use flowhn_torch::op::{Arg, call};
use flowhn_torch::{Error, catch};
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
        let copy = |values: &[i64]| -> Result<Tensor> {
            let values = on_host(batch, values, device)?;
            Ok(catch(|| Ok(values.to_device_(device, Kind::Int64, true, false)))?)
        };
        Ok(Self {
            ids_bl: copy(&batch.inputs)?,
            targets_bl: copy(&batch.targets)?,
            segments_bl: reset_documents.then(|| copy(&batch.segments)).transpose()?,
        })
    }

    /// Whether the batch has this one's shape, and documents are kept apart in both or in neither.
    pub(crate) fn fits(&self, batch: &Batch, reset_documents: bool) -> bool {
        self.ids_bl.size() == shape(batch) && self.segments_bl.is_some() == reset_documents
    }

    /// Copies another batch of the same shape into the same tensors.
    pub(crate) fn overwrite(&mut self, batch: &Batch) -> Result<()> {
        let copy = |place: &Tensor, values: &[i64]| -> Result<()> {
            let values = on_host(batch, values, place.device())?;
            call("aten::copy_", "", &[Arg::Tensor(place), Arg::Tensor(&values), Arg::Bool(true)])?;
            Ok(())
        };
        copy(&self.ids_bl, &batch.inputs)?;
        copy(&self.targets_bl, &batch.targets)?;
        self.segments_bl.as_ref().map_or(Ok(()), |segments_bl| copy(segments_bl, &batch.segments))
    }
}

fn shape(batch: &Batch) -> [i64; 2] {
    [batch.batch_size as i64, batch.seq_len as i64]
}

/// The values on the host; pinned where they go to a GPU, so that the copy there runs beside the host, which goes on to launch the
/// step's work. libtorch keeps pinned memory until the copies out of it are done.
fn on_host(batch: &Batch, values: &[i64], device: Device) -> Result<Tensor> {
    let tensor = catch(|| Ok(Tensor::from_slice(values).f_view(shape(batch))?))?;
    if !device.is_cuda() {
        return Ok(tensor);
    }
    // By name: the method of `tch` passes a device, which libtorch deprecates with a warning a call.
    let pinned = call("aten::pin_memory", "", &[Arg::Tensor(&tensor)])?.into_iter().next().flatten();
    Ok(pinned.ok_or_else(|| Error::invalid("pin_memory", "the operator returned no tensor"))?)
}
