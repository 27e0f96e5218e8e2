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
/// swizzled by the row's number modulo 8. Parts of a box outside the matrix are read as 0 and not written.
#[derive(Clone, Copy, Debug)]
pub struct Boxes<'a> {
    /// bf16, `[rows, columns]`; a row's elements are neighbours, and each row begins at a multiple of 16 bytes.
    pub matrix: &'a Tensor,
    /// 1 to 256.
    pub n_rows: u32,
}

impl Boxes<'_> {
    /// What the map is made from beside the matrix's address, or what is wrong.
    pub(super) fn form(&self) -> Result<BoxMap, String> {
        let (size, stride, address) = (self.matrix.size(), self.matrix.stride(), self.matrix.data_ptr());
        let ([height, width], [row_stride, column_stride], tch::Kind::BFloat16) =
            (&size[..], &stride[..], self.matrix.kind())
        else {
            return Err(format!(
                "boxes of a {:?} tensor of shape {size:?}, expected a bf16 matrix",
                self.matrix.kind()
            ));
        };
        // The stride of a single row or column leads nowhere.
        let row_bytes =
            if *height == 1 { (*width as usize * 2).next_multiple_of(ALIGNMENT) } else { *row_stride as usize * 2 };
        let is_dense = *width == 1 || *column_stride == 1;
        let is_aligned = row_bytes.is_multiple_of(ALIGNMENT)
            && row_bytes >= 2 * *width as usize
            && (address as usize).is_multiple_of(ALIGNMENT);
        if !is_dense || !is_aligned || size.contains(&0) || !(1..=MAX_ROWS).contains(&self.n_rows) {
            return Err(format!(
                "boxes of {} rows of a matrix of shape {size:?} with strides {stride:?} at {address:p}: \
                 expected dense rows at multiples of {ALIGNMENT} bytes and 1 to {MAX_ROWS} rows",
                self.n_rows
            ));
        }
        Ok(BoxMap {
            size: [*width as u64, *height as u64],
            row_bytes: row_bytes as u64,
            box_size: [(ROW_BYTES / 2) as u32, self.n_rows],
        })
    }

    /// The map that a kernel takes, or what is wrong.
    pub(super) fn map(&self) -> Result<sys::CUtensorMap, String> {
        let BoxMap { size, row_bytes, box_size } = self.form()?;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: every pointer but the address leads to as many numbers as two axes have; the driver keeps none of them, and does
        // not read what is at the address.
        let outcome = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                self.matrix.data_ptr(),
                size.as_ptr(),
                &row_bytes,
                box_size.as_ptr(),
                [1, 1].as_ptr(),
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
        assert!(refused(&matrix.view([2, 2, 64]), 8).contains("expected a bf16 matrix"));
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
        assert_eq!(form(&matrix), BoxMap { size: [64, 4], row_bytes: 128, box_size: [64, 8] });
        assert_eq!(form(&matrix.narrow(1, 8, 13)), BoxMap { size: [13, 4], row_bytes: 128, box_size: [64, 8] });
        let row = matrix.narrow(0, 3, 1).narrow(1, 0, 13);
        assert_eq!(form(&row), BoxMap { size: [13, 1], row_bytes: 32, box_size: [64, 8] });
    }
}
