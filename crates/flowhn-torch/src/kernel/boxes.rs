//! Matrices as Hopper's copy engine sees them.

use cudarc::driver::{result, sys};
use flowhn_trace::BoxMap;
use tch::Tensor;

/// Bytes of a row of a box.
const ROW_BYTES: usize = 128;
/// The most rows that a box can have.
const MAX_ROWS: u32 = 256;
/// Rows of a matrix begin at multiples of this.
const ALIGNMENT: usize = 16;
/// What a kernel's parameter has.
pub(super) const MAP_BYTES: usize = size_of::<sys::CUtensorMap>();

/// A matrix that a kernel copies in boxes of so many rows of 128 bytes, to and from shared memory in the order that products want:
/// swizzled by the row's number modulo 8. Parts of a box outside the matrix are read as 0 and not written. Of a tensor with one or two axes
/// before those of rows and columns, a box is of one of its matrices.
#[derive(Clone, Copy, Debug)]
pub struct Boxes<'a> {
    /// bf16, `[.., rows, columns]`, at most four axes; a row's elements are neighbours, and whatever an axis leads to begins at a multiple of
    /// 16 bytes.
    pub matrix: &'a Tensor,
    /// 1 to 256.
    pub n_rows: u32,
}

impl Boxes<'_> {
    /// What the map is made from beside the matrix's address, or what is wrong.
    pub(super) fn form(&self) -> Result<BoxMap, String> {
        let (size, stride, address) = (self.matrix.size(), self.matrix.stride(), self.matrix.data_ptr());
        if !(2..=4).contains(&size.len()) || self.matrix.kind() != tch::Kind::BFloat16 {
            return Err(format!(
                "boxes of a {:?} tensor of shape {size:?}, expected bf16 and two to four axes",
                self.matrix.kind()
            ));
        }
        let n_axes = size.len();
        let width = size[n_axes - 1] as usize;
        let is_dense = width == 1 || stride[n_axes - 1] == 1;
        // From the rows' axis on, that is backwards.
        let mut map = BoxMap {
            n_axes: n_axes as u32,
            size: [width as u64, 1, 1, 1],
            strides: [ALIGNMENT as u64; 3],
            box_size: [(ROW_BYTES / 2) as u32, self.n_rows, 1, 1],
        };
        let mut is_aligned = (address as usize).is_multiple_of(ALIGNMENT);
        for axis in 1..n_axes {
            let (length, step) = (size[n_axes - 1 - axis], stride[n_axes - 1 - axis]);
            map.size[axis] = length as u64;
            // The stride of a single element leads nowhere.
            let n_bytes = if length == 1 {
                (width * 2).next_multiple_of(ALIGNMENT)
            } else {
                usize::try_from(step).unwrap_or(0) * 2
            };
            is_aligned &= n_bytes.is_multiple_of(ALIGNMENT) && n_bytes >= width * 2;
            map.strides[axis - 1] = n_bytes as u64;
        }
        if !is_dense || !is_aligned || size.contains(&0) || !(1..=MAX_ROWS).contains(&self.n_rows) {
            return Err(format!(
                "boxes of {} rows of a matrix of shape {size:?} with strides {stride:?} at {address:p}: \
                 expected dense rows at multiples of {ALIGNMENT} bytes and 1 to {MAX_ROWS} rows",
                self.n_rows
            ));
        }
        Ok(map)
    }

    /// The map that a kernel takes, or what is wrong.
    pub(super) fn map(&self) -> Result<sys::CUtensorMap, String> {
        let BoxMap { n_axes, size, strides, box_size } = self.form()?;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: every pointer but the address leads to at least as many numbers as there are axes; the driver keeps none of them, and does
        // not read what is at the address.
        let outcome = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                n_axes,
                self.matrix.data_ptr(),
                size.as_ptr(),
                strides.as_ptr(),
                box_size.as_ptr(),
                [1; 4].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        match outcome.result() {
            Ok(()) => Ok(map),
            Err(result::DriverError(code)) => {
                Err(format!("the driver makes no map of a matrix of shape {size:?}: {code:?}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn what_the_copy_engine_does_not_take_is_refused() {
        let matrix = Tensor::zeros([4, 64], (Kind::BFloat16, Device::Cpu));
        let refused = |matrix: &Tensor, n_rows| Boxes { matrix, n_rows }.form().unwrap_err();
        assert!(refused(&matrix.to_kind(Kind::Float), 8).contains("Float"));
        assert!(refused(&matrix.view([1, 2, 1, 2, 64]), 8).contains("two to four axes"));
        for (matrix, n_rows) in [
            (matrix.tr(), 8),
            (matrix.narrow(1, 1, 8), 8),
            (matrix.view([64, 4]), 8),
            (matrix.narrow(0, 0, 0), 8),
            (matrix.shallow_clone(), 0),
            (matrix.shallow_clone(), 257),
        ] {
            assert!(refused(&matrix, n_rows).contains("dense rows at multiples of 16 bytes"), "{matrix:?} {n_rows}");
        }
    }

    #[test]
    fn maps_begin_with_the_axis_of_neighbours() {
        let matrix = Tensor::zeros([4, 64], (Kind::BFloat16, Device::Cpu));
        let form = |matrix: &Tensor| Boxes { matrix, n_rows: 8 }.form().unwrap();
        let of = |size, strides| BoxMap { n_axes: 2, size, strides, box_size: [64, 8, 1, 1] };
        assert_eq!(form(&matrix), of([64, 4, 1, 1], [128, 16, 16]));
        assert_eq!(form(&matrix.narrow(1, 8, 13)), of([13, 4, 1, 1], [128, 16, 16]));
        let row = matrix.narrow(0, 3, 1).narrow(1, 0, 13);
        assert_eq!(form(&row), of([13, 1, 1, 1], [32, 16, 16]));
        // Heads of 16 of two sequences of 2 tokens.
        let heads = matrix.view([2, 2, 4, 16]).transpose(1, 2);
        let want = BoxMap { n_axes: 4, size: [16, 2, 4, 2], strides: [128, 32, 256], box_size: [64, 8, 1, 1] };
        assert_eq!(form(&heads), want);
    }
}
