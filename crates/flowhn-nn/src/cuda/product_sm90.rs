//! What launches of our own products on Hopper share (`product_sm90.cuh`).

use tch::{Device, Kind, Tensor};

use flowhn_torch::kernel::{Arg, Boxes, Kernel};
use flowhn_torch::{DeviceProperties, Result};

/// Rows of a tile, and of the tiles of a cluster.
pub(super) const TILE_ROWS: i64 = 128;
pub(super) const CLUSTER_ROWS: i64 = Form::BLOCKS * TILE_ROWS;
/// The most rows or columns of a result, which kernels count with 32 bits.
pub(super) const MAX_ROWS: i64 = (1 << 31) - 1024;

/// Macros of a kernel.
pub(crate) type Macros<const N: usize> = [(&'static str, i64); N];

/// What the macros of a product say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    /// Of a tile: 256, shared by both groups, or 128, of a group's own.
    pub(super) columns: i64,
    /// Of the ring.
    pub(super) stages: i64,
    /// Of a warp, for 16 rows of 64 columns each.
    pub(super) places: i64,
}

impl Form {
    /// A group of four warps that copies and two that multiply.
    const N_THREADS: u32 = 384;
    /// Blocks of a cluster, which have neighbouring rows of the same columns.
    const BLOCKS: i64 = 2;

    pub(super) const fn defines(self) -> Macros<3> {
        [("TILE_COLUMNS", self.columns), ("STAGES", self.stages), ("PLACES", self.places)]
    }

    /// These and one more.
    pub(super) const fn defines_and(self, one: (&'static str, i64)) -> Macros<4> {
        let [columns, stages, places] = self.defines();
        [columns, stages, places, one]
    }

    /// A stage has 64 values of k of the tile's rows and columns. Barriers: two for a stage, one for a group, one for a place.
    const fn shared_bytes(self) -> usize {
        let (n_warps, place_bytes) = (8, 2 * 16 * 64);
        let stage_bytes = 2 * 64 * (TILE_ROWS + self.columns);
        let n_barriers = 2 * self.stages + 2 + n_warps * self.places;
        (self.stages * stage_bytes + n_warps * self.places * place_bytes + 8 * n_barriers) as usize
    }

    /// Tiles of a result of this size.
    pub(super) const fn n_tiles(self, n_rows: i64, n_columns: i64) -> i64 {
        up_to(n_rows, TILE_ROWS) / TILE_ROWS * (up_to(n_columns, self.columns) / self.columns)
    }

    /// Launches a kernel for a result of this size.
    pub(super) fn launch(self, kernel: &Kernel, size: [i64; 2], n_multiprocessors: i64, args: &[Arg]) -> Result<()> {
        let grid = self.grid(size[0], size[1], n_multiprocessors);
        kernel.launch(grid, Self::N_THREADS, self.shared_bytes(), args)
    }

    /// A block a multiprocessor, or fewer.
    fn grid(self, n_rows: i64, n_columns: i64, n_multiprocessors: i64) -> [u32; 3] {
        let n_clusters = self.n_tiles(up_to(n_rows, CLUSTER_ROWS), n_columns) / Self::BLOCKS;
        [(n_clusters.min(n_multiprocessors / Self::BLOCKS) * Self::BLOCKS) as u32, 1, 1]
    }
}

/// The multiprocessors of a device that has these products.
pub(super) fn multiprocessors(device: Device) -> Result<Option<i64>> {
    let Device::Cuda(device_idx) = device else { return Ok(None) };
    let properties = DeviceProperties::of(device_idx)?;
    let n_multiprocessors = i64::from(properties.n_multiprocessors);
    Ok(Some(n_multiprocessors).filter(|&n| properties.compute_capability == 90 && n >= Form::BLOCKS))
}

/// Whether the products take a matrix as it is: bf16, rows of a multiple of 8 values that begin at multiples of 16 bytes.
pub(super) fn fits(matrix: &Tensor) -> bool {
    let (size, stride) = (matrix.size(), matrix.stride());
    matrix.kind() == Kind::BFloat16
        && matrix.dim() == 2
        && matrix.numel() > 0
        && size[1] % 8 == 0
        && stride[1] == 1
        && (size[0] == 1 || stride[0] >= size[1] && stride[0] % 8 == 0)
        && (matrix.data_ptr() as usize).is_multiple_of(16)
}

/// A factor with k along its rows, as kernels copy it.
pub(super) fn factor(matrix: &Tensor) -> Arg<'_> {
    Arg::Boxes(Boxes { matrix, n_rows: 128 })
}

/// A factor with k from row to row.
pub(super) fn factor_by_k(matrix: &Tensor) -> Arg<'_> {
    Arg::Boxes(Boxes { matrix, n_rows: 64 })
}

/// A matrix that warps send, or ask for, by 16 rows.
pub(super) fn panels(matrix: &Tensor) -> Arg<'_> {
    Arg::Boxes(Boxes { matrix, n_rows: 16 })
}

/// The next multiple of `step`.
pub(super) const fn up_to(n: i64, step: i64) -> i64 {
    (n + step - 1) / step * step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_block_is_without_its_neighbour_or_without_work() {
        let form = Form { columns: 256, stages: 4, places: 2 };
        for n_multiprocessors in [2, 3, 132, 133] {
            for n_rows in [1, 128, 129, 300, 4096] {
                for n_columns in [1, 1300, 65_536] {
                    let [n_blocks, 1, 1] = form.grid(n_rows, n_columns, n_multiprocessors) else { unreachable!() };
                    assert!(n_blocks >= 2 && n_blocks % 2 == 0 && i64::from(n_blocks) <= n_multiprocessors);
                    let n_pairs = form.n_tiles(n_rows, n_columns).max(form.n_tiles(n_rows + 128, n_columns)) / 2;
                    assert!(i64::from(n_blocks / 2) <= n_pairs);
                }
            }
        }
    }
}
