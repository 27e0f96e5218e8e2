//! Rows of a tensor `[batch, seq_len, channels]` with any strides, as slices of neighbouring channels.

use flowhn_nn::simd::Real;
use flowhn_torch::{Result, cpu};
use tch::Tensor;

/// A tensor in the dtype `R` whose channels lie side by side.
///
/// Converting bf16 or gathering strided channels costs a copy, which lives as long as this value.
#[derive(Debug)]
pub(super) struct Source(Tensor);

impl Source {
    pub(super) fn new<R: Real>(tensor: &Tensor) -> Self {
        let tensor = tensor.to_kind(R::KIND);
        let neighbours = tensor.stride().last() == Some(&1) || tensor.size().last() == Some(&1);
        Self(if neighbours { tensor } else { tensor.contiguous() })
    }

    /// The sizes of a tensor with `N` axes.
    pub(super) fn sizes<const N: usize>(&self) -> [usize; N] {
        let sizes = self.0.size();
        std::array::from_fn(|axis| sizes[axis] as usize)
    }

    /// The rows of a tensor with three axes.
    pub(super) fn rows<R: Real>(&self) -> Result<Rows<'_, R>> {
        self.rows_of_part(0)
    }

    /// The rows of part `part_idx` (a head, a group) of a tensor `[batch, seq_len, parts, channels]`, or of the whole of one
    /// with three axes.
    pub(super) fn rows_of_part<R: Real>(&self, part_idx: usize) -> Result<Rows<'_, R>> {
        let strided = cpu::strided::<R>(&self.0)?;
        let (shape, strides) = (&strided.shape, &strided.strides);
        let first = if shape.len() == 4 { part_idx * strides[2] } else { 0 };
        Ok(Rows {
            data: strided.data.get(first..).unwrap_or_default(),
            n_channels: shape[shape.len() - 1],
            batch_stride: strides[0],
            token_stride: strides[1],
        })
    }
}

/// Rows of channels, by batch and token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows<'a, R> {
    data: &'a [R],
    n_channels: usize,
    batch_stride: usize,
    token_stride: usize,
}

impl<'a, R: Real> Rows<'a, R> {
    /// All channels of one token.
    #[inline(always)]
    pub(super) fn row(&self, batch_idx: usize, token_idx: usize) -> &'a [R] {
        let start = batch_idx * self.batch_stride + token_idx * self.token_stride;
        &self.data[start..start + self.n_channels]
    }

    /// Copies the channels from `start` of `len` tokens from `first` into rows of `width`; channels past the last become zero.
    #[inline(always)]
    pub(super) fn load(&self, batch_idx: usize, first: usize, len: usize, start: usize, width: usize, out: &mut [R]) {
        for (token, out) in out.chunks_exact_mut(width).take(len).enumerate() {
            let row = self.row(batch_idx, first + token);
            let n = width.min(row.len() - start);
            out[..n].copy_from_slice(&row[start..start + n]);
            out[n..].fill(R::ZERO);
        }
    }
}
