//! A CPU tensor as rows along its last axis, and loops over blocks of rows.

use flowhn_torch::cpu::{self, Element};
use flowhn_torch::{Error, Result};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

/// Runs `$body` with `$T` standing for the element type of a float tensor, or returns [`Error::Dtype`] for any other.
macro_rules! for_float_kind {
    ($op:expr, $arg:expr, $kind:expr, $T:ident => $body:expr) => {
        match $kind {
            tch::Kind::Float => {
                type $T = f32;
                $body
            }
            tch::Kind::BFloat16 => {
                type $T = half::bf16;
                $body
            }
            tch::Kind::Double => {
                type $T = f64;
                $body
            }
            got => Err(flowhn_torch::Error::Dtype {
                op: $op,
                arg: $arg,
                got,
                want: "Float, BFloat16 or Double".to_owned(),
            }),
        }
    };
}
pub(crate) use for_float_kind;

/// What an operation answers on a device that it has no kernel for.
pub(crate) fn no_kernel(op: &'static str, arg: &'static str, got: Device) -> Error {
    Error::Device { op, arg, got, want: "the CPU or a CUDA device: there is no kernel for others".to_owned() }
}

/// Checks that parameters have the element type of the activations or, beside bf16 activations, f32.
pub(crate) fn check_weight_kind(op: &'static str, weight: &Tensor, activations: Kind) -> Result<()> {
    let allowed = match activations {
        Kind::BFloat16 => &[Kind::BFloat16, Kind::Float][..],
        Kind::Double => &[Kind::Double],
        _ => &[Kind::Float],
    };
    flowhn_torch::check::kind(op, "weight", weight, allowed)
}

/// The same tensor where its rows are contiguous in memory, a contiguous copy where they are not.
pub(crate) fn with_contiguous_rows(tensor: &Tensor) -> Tensor {
    let (size, stride) = (tensor.size(), tensor.stride());
    match (size.last(), stride.last()) {
        (Some(&size), Some(&stride)) if size > 1 && stride != 1 => tensor.contiguous(),
        _ => tensor.shallow_clone(),
    }
}

/// The rows of a tensor `[.., d]` whose last axis is contiguous; the other axes may have any strides.
pub(crate) struct Rows<'a, T> {
    data: &'a [T],
    d: usize,
    n_rows: usize,
    /// Size and stride of the leading axes, innermost first, merged where one continues the other.
    axes: Vec<(usize, usize)>,
}

impl<'a, T: Element> Rows<'a, T> {
    /// Views a tensor that [`with_contiguous_rows`] returned.
    pub(crate) fn new(tensor: &'a Tensor) -> Result<Self> {
        let view = cpu::strided::<T>(tensor)?;
        let Some((&d, lead)) = view.shape.split_last() else {
            return Err(Error::invalid("rows", "the tensor has no axes"));
        };
        let mut axes: Vec<(usize, usize)> = Vec::with_capacity(lead.len());
        for (&size, &stride) in lead.iter().zip(&view.strides).rev().filter(|&(&size, _)| size != 1) {
            match axes.last_mut() {
                Some(inner) if stride == inner.0 * inner.1 => inner.0 *= size,
                _ => axes.push((size, stride)),
            }
        }
        Ok(Self { data: view.data, d, n_rows: lead.iter().product(), axes })
    }

    /// Number of rows.
    pub(crate) fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Row `row_idx`, counted as in a contiguous tensor.
    #[inline]
    pub(crate) fn row(&self, row_idx: usize) -> &'a [T] {
        let start = match self.axes[..] {
            [] => 0,
            [(_, stride)] => row_idx * stride,
            _ => {
                let mut rest = row_idx;
                let mut start = 0;
                for &(size, stride) in &self.axes {
                    start += rest % size * stride;
                    rest /= size;
                }
                start
            }
        };
        &self.data[start..start + self.d]
    }
}

/// Rows that one task takes. It depends on their number alone, so that sums over blocks come out the same on any
/// machine.
pub(crate) fn block_rows(n_rows: usize) -> usize {
    n_rows.div_ceil(64).max(8)
}

/// Elements below which handing work to other threads costs more than it saves.
const PARALLEL_FROM: usize = 1 << 15;

/// Calls `work(block_idx, block)` for each block of a buffer, in parallel where it pays; the results come in the order
/// of the blocks.
pub(crate) fn map_blocks<A: Send, R: Send>(
    buffer: &mut [A],
    block_len: usize,
    work: impl Fn(usize, &mut [A]) -> R + Send + Sync,
) -> Vec<R> {
    if buffer.len() < PARALLEL_FROM {
        return buffer.chunks_mut(block_len).enumerate().map(|(i, block)| work(i, block)).collect();
    }
    buffer.par_chunks_mut(block_len).enumerate().map(|(i, block)| work(i, block)).collect()
}

/// As [`map_blocks`] over two buffers, each with the length of its blocks.
pub(crate) fn map_blocks2<A: Send, B: Send, R: Send>(
    (a, a_len): (&mut [A], usize),
    (b, b_len): (&mut [B], usize),
    work: impl Fn(usize, &mut [A], &mut [B]) -> R + Send + Sync,
) -> Vec<R> {
    if a.len().max(b.len()) < PARALLEL_FROM {
        return a.chunks_mut(a_len).zip(b.chunks_mut(b_len)).enumerate().map(|(i, (a, b))| work(i, a, b)).collect();
    }
    a.par_chunks_mut(a_len).zip(b.par_chunks_mut(b_len)).enumerate().map(|(i, (a, b))| work(i, a, b)).collect()
}

/// Adds partial sums in their order.
pub(crate) fn add_up<R: Copy + std::ops::AddAssign>(total: &mut [R], partials: &[Vec<R>]) {
    for partial in partials {
        for (total, &part) in total.iter_mut().zip(partial) {
            *total += part;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_follow_any_leading_strides() {
        let base = Tensor::arange(4 * 6 * 10, (Kind::Float, Device::Cpu)).view([4, 6, 10]);
        let views = [
            base.shallow_clone(),
            base.narrow(2, 3, 5),
            base.transpose(0, 1),
            base.slice(1, 1, 6, 2),
            base.narrow(0, 1, 1),
            base.select(0, 2).unsqueeze(0).expand([3, 6, 10], false),
        ];
        for view in views {
            let want = Vec::<f32>::try_from(view.contiguous().view(-1)).unwrap();
            let rows = Rows::<f32>::new(&view).unwrap();
            let got: Vec<f32> = (0..rows.n_rows()).flat_map(|i| rows.row(i).to_vec()).collect();
            assert_eq!(got, want, "{:?} {:?}", view.size(), view.stride());
        }
    }

    #[test]
    fn a_transposed_last_axis_is_copied() {
        let x = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]).tr();
        assert!(with_contiguous_rows(&x).is_contiguous());
        let row = x.narrow(1, 0, 1);
        assert_eq!(with_contiguous_rows(&row).stride(), row.stride());
    }
}
