//! Rounding a matrix to fp8, in order and transposed.

use tch::{Device, Kind, Tensor};

use flowhn_torch::Result;
use flowhn_torch::kernel::rows::{Rows, rows_are_aligned};
use flowhn_torch::kernel::{Arg, Kernel};

use super::format::Format;
use super::scales::Slot;
use crate::kernels::FP8_CAST;
use crate::rows::no_kernel;

/// What sizes of factors have to be multiples of.
pub(crate) const MULTIPLE: i64 = 16;
/// Rows and columns that a block of the kernel takes.
const TILE: i64 = 128;
pub(super) const THREADS: u32 = 256;

/// A matrix in fp8, in the orders that were wanted.
#[derive(Debug)]
pub(crate) struct Rounded {
    /// `[n_padded, n_cols]`.
    pub(crate) plain: Option<Tensor>,
    /// `[n_cols, n_padded]`.
    pub(crate) transposed: Option<Tensor>,
}

impl Rounded {
    /// Memory for a matrix, not yet written; its rows are padded to a multiple of 16.
    pub(crate) fn empty(
        n_rows: i64,
        n_cols: i64,
        plain: bool,
        transposed: bool,
        like: &Tensor,
        format: Format,
    ) -> Result<Self> {
        let n_padded = padded(n_rows);
        let empty = |shape: [i64; 2]| Tensor::f_empty(shape, (format.kind(), like.device()));
        Ok(Self {
            plain: plain.then(|| empty([n_padded, n_cols])).transpose()?,
            transposed: transposed.then(|| empty([n_cols, n_padded])).transpose()?,
        })
    }
}

/// The tiles along an axis.
pub(super) fn tiles(n: i64) -> u32 {
    ((n + TILE - 1) / TILE) as u32
}

/// The rows of a matrix with those that are added.
pub(super) fn padded(n_rows: i64) -> i64 {
    (n_rows + MULTIPLE - 1) / MULTIPLE * MULTIPLE
}

/// Rounds `x`, bf16 `[.., n_cols]`, into `out` with the scale of `slot`, which takes note of the largest value. Rows that were
/// added become zeros.
///
/// # Errors
/// [`flowhn_torch::Error::Device`] for a device without a way to do it; [`flowhn_torch::Error::Kernel`] or
/// [`flowhn_torch::Error::Torch`] if it fails.
pub(crate) fn cast(x: &Tensor, slot: &Slot, out: &Rounded) -> Result<()> {
    match x.device() {
        Device::Cuda(_) => on_cuda(x, slot, out),
        Device::Cpu => on_cpu(x, slot, out),
        device => Err(no_kernel("fp8", "x", device)),
    }
}

/// Rows and columns of `[.., n_cols]`.
pub(super) fn matrix_size(x: &Tensor) -> [i64; 2] {
    let n_cols = x.size().last().copied().unwrap_or(1);
    [x.numel() as i64 / n_cols.max(1), n_cols]
}

/// The same values in rows that begin at 16 bytes and have no gaps inside.
fn as_rows(x: &Tensor) -> Result<Rows> {
    const OP: &str = "fp8_cast";
    let rows = Rows::new(OP, &[x])?;
    if rows_are_aligned(matrix_size(x)[1], &[rows.tensor(0)]) {
        return Ok(rows);
    }
    let mut copy = Tensor::f_empty(x.size(), (x.kind(), x.device()))?;
    copy.f_copy_(x)?;
    Rows::new(OP, &[&copy])
}

fn on_cuda(x: &Tensor, slot: &Slot, out: &Rounded) -> Result<()> {
    let [n_rows, n_cols] = matrix_size(x);
    let (n_padded, rows) = (padded(n_rows), as_rows(x)?);
    let [outer_stride, inner_stride] = rows.strides(0);
    let args = [
        Arg::Tensor(rows.tensor(0)),
        outer_stride,
        inner_stride,
        rows.inner(),
        Arg::opt(out.plain.as_ref()),
        Arg::opt(out.transposed.as_ref()),
        Arg::Tensor(slot.numbers()),
        Arg::I32(n_rows as i32),
        Arg::I32(n_padded as i32),
        Arg::I32(n_cols as i32),
    ];
    let defines = [("FORMAT", slot.format().define())];
    Kernel { source: &FP8_CAST, entry: "fp8_cast", defines: &defines }.launch(
        [tiles(n_cols), tiles(n_padded), 1],
        THREADS,
        0,
        &args,
    )
}

fn on_cpu(x: &Tensor, slot: &Slot, out: &Rounded) -> Result<()> {
    let ([n_rows, n_cols], format) = (matrix_size(x), slot.format());
    let x = x.f_reshape([n_rows, n_cols])?.f_to_kind(Kind::Float)?;
    slot.note(&x.f_abs()?.f_nan_to_num(0., f64::INFINITY, f64::NEG_INFINITY)?.f_max()?)?;
    let scaled = x.f_masked_fill(&x.f_isinf()?, f64::NAN)?.f_mul(&slot.scale()?)?;
    // libtorch's own cast does not saturate.
    let scaled = scaled.f_clamp(-format.largest(), format.largest())?;
    let rounded = scaled.f_constant_pad_nd([0, 0, 0, padded(n_rows) - n_rows])?;
    if let Some(plain) = &out.plain {
        plain.shallow_clone().f_copy_(&rounded)?;
    }
    if let Some(transposed) = &out.transposed {
        transposed.shallow_clone().f_copy_(&rounded.f_tr()?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::scales::Scales;
    use super::*;

    /// The definition: the nearest of all numbers of the format, the one with the even code where two are as near.
    fn nearest(x: f32, format: Format) -> u8 {
        let (mantissa_bits, bias, last) = match format {
            Format::E4M3 => (3, 7, 0x7e),
            Format::E5M2 => (2, 15, 0x7b),
        };
        let value = |code: u8| -> f64 {
            let (exponent, mantissa) = (i32::from(code >> mantissa_bits), f64::from(code & ((1 << mantissa_bits) - 1)));
            let one = f64::from(1 << mantissa_bits);
            match exponent {
                0 => mantissa / one * 2f64.powi(1 - bias),
                _ => (1. + mantissa / one) * 2f64.powi(exponent - bias),
            }
        };
        // What is above the largest is as far from it as the largest itself: f64 does not tell all such distances apart.
        let size = f64::from(x.abs()).min(value(last));
        let distance = |code: u8| (size - value(code)).abs();
        let best = (0..=last).min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a % 2).cmp(&(b % 2))));
        best.unwrap_or_default() | (u8::from(x.is_sign_negative()) << 7)
    }

    /// Every bf16 number, under several scales.
    #[test]
    fn the_cpu_rounds_to_the_nearest() {
        let scales = Scales::new(1, Device::Cpu).unwrap();
        let [activation, _, gradient] = scales.slots(0).unwrap();
        let bits: Vec<i16> = (i16::MIN..=i16::MAX).collect();
        let x = Tensor::from_slice(&bits).view_dtype(Kind::BFloat16).view([256, 256]);
        let values = Vec::<f32>::try_from(x.to_kind(Kind::Float).view(-1)).unwrap();
        for slot in [activation, gradient] {
            slot.seed_with(|| Ok(Tensor::from_slice(&[0.75f32]))).unwrap();
            let scale = slot.scale().unwrap().double_value(&[0]) as f32;
            let out = Rounded::empty(256, 256, true, true, &x, slot.format()).unwrap();
            cast(&x, &slot, &out).unwrap();
            let [plain, transposed] = [out.plain, out.transposed].map(|t| t.unwrap().view_dtype(Kind::Uint8));
            assert!(plain.tr().equal(&transposed));
            let got = Vec::<u8>::try_from(plain.view(-1)).unwrap();
            for (x, got) in values.iter().zip(got) {
                let is_nan = got & 0x7f == 0x7f || (slot.format() == Format::E5M2 && got & 0x7f > 0x7c);
                assert_eq!(is_nan, !x.is_finite(), "{x}");
                assert!(is_nan || got == nearest(x * scale, slot.format()), "{x}: {got:#x}");
            }
            assert_eq!(slot.numbers().double_value(&[2]), f64::INFINITY);
        }
    }

    #[test]
    fn rows_are_padded_with_zeros() {
        let scales = Scales::new(1, Device::Cpu).unwrap();
        let [slot, ..] = scales.slots(0).unwrap();
        let x = Tensor::ones([3, 32], (Kind::BFloat16, Device::Cpu));
        slot.seed_with(|| Ok(x.shallow_clone())).unwrap();
        let out = Rounded::empty(3, 32, true, true, &x, slot.format()).unwrap();
        cast(&x, &slot, &out).unwrap();
        let sums = |t: Option<Tensor>, axis: i64| {
            Vec::<f64>::try_from(t.unwrap().to_kind(Kind::Double).sum_dim_intlist(axis, false, Kind::Double)).unwrap()
        };
        let want: Vec<f64> = (0..16).map(|row| if row < 3 { 32. * 128. } else { 0. }).collect();
        assert_eq!(sums(out.plain, 1), want);
        assert_eq!(sums(out.transposed, 0), want);
    }
}
