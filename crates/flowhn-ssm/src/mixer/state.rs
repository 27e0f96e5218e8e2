//! What decoding remembers of the tokens a mixer has read: the conv window and the scan state.

use flowhn_torch::Result;
use tch::{Device, Kind, Tensor};

use super::SsmConfig;

/// The state of one mixer for a batch of sequences, f32.
///
/// [`SsmMixer::forward`](super::SsmMixer::forward) puts new tensors here, [`SsmMixer::step`](super::SsmMixer::step) writes into those that
/// are here. So [`SsmState::copy`] before stepping on, where sequences fork or a state is to be kept; a shallow clone of a tensor is the
/// tensor.
#[derive(Debug)]
pub struct SsmState {
    /// The last `d_conv - 1` inputs of the convolution, `[batch, d_conv - 1, channels]`.
    pub conv_bje: Tensor,
    /// The state of the recurrence: `[batch, d_inner, d_state]` (Mamba-1) or `[batch, n_heads, d_head, d_state]` (Mamba-2).
    pub scan: Tensor,
}

impl SsmState {
    /// The state before any token: zeros.
    pub fn new(config: &SsmConfig, batch: usize, device: Device) -> Self {
        let [conv_bje, scan] = config.state_shapes().map(|shape| {
            let sizes: Vec<i64> = std::iter::once(batch as i64).chain(shape).collect();
            Tensor::zeros(sizes, (Kind::Float, device))
        });
        Self { conv_bje, scan }
    }

    /// The same state in tensors of its own, off the autograd tape.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if there is no memory.
    pub fn copy(&self) -> Result<Self> {
        Ok(Self { conv_bje: self.conv_bje.f_detach_copy()?, scan: self.scan.f_detach_copy()? })
    }

    /// Bytes the state holds.
    pub fn n_bytes(&self) -> u64 {
        [&self.conv_bje, &self.scan].iter().map(|t| (t.numel() * t.kind().elt_size_in_bytes()) as u64).sum()
    }

    /// Cuts the state off the autograd tape, so that a later backward stops here and earlier graphs are freed.
    pub fn detach(&mut self) {
        self.conv_bje = self.conv_bje.detach();
        self.scan = self.scan.detach();
    }
}
