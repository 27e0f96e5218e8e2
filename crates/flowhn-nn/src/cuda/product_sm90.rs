//! What launches of our own products on Hopper share (`product_sm90.cuh`).

use tch::{Device, Kind, Tensor};

use flowhn_torch::kernel::{Arg, Boxes};
use flowhn_torch::{DeviceProperties, Result};

/// Rows of a tile.
pub(super) const TILE_ROWS: i64 = 128;

/// The macros of a product.
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
    pub(super) const N_THREADS: u32 = 384;
    /// Rows of the boxes in which a factor with k along its rows is copied.
    pub(super) const FACTOR_ROWS: u32 = 128;
    /// Blocks of a cluster, which have neighbouring rows of the same columns.
    const BLOCKS: i64 = 2;

    pub(super) const fn defines(self) -> [(&'static str, i64); 3] {
        [("TILE_COLUMNS", self.columns), ("STAGES", self.stages), ("PLACES", self.places)]
    }

    /// A stage has 64 values of k of the tile's rows and columns. Barriers: two for a stage, one for a group, one for a place.
    pub(super) const fn shared_bytes(self) -> usize {
        let (n_warps, place_bytes) = (8, 2 * 16 * 64);
        let stage_bytes = 2 * 64 * (TILE_ROWS + self.columns);
        let n_barriers = 2 * self.stages + 2 + n_warps * self.places;
        (self.stages * stage_bytes + n_warps * self.places * place_bytes + 8 * n_barriers) as usize
    }

    /// Tiles of a result of this size.
    pub(super) const fn n_tiles(self, n_rows: i64, n_columns: i64) -> i64 {
        up_to(n_rows, TILE_ROWS) / TILE_ROWS * (up_to(n_columns, self.columns) / self.columns)
    }

    /// A grid for a result of this size: a block a multiprocessor, or fewer.
    pub(super) fn grid(self, n_rows: i64, n_columns: i64, n_multiprocessors: i64) -> [u32; 3] {
        let n_clusters = self.n_tiles(up_to(n_rows, TILE_ROWS * Self::BLOCKS), n_columns) / Self::BLOCKS;
        [(n_clusters.min(n_multiprocessors / Self::BLOCKS) * Self::BLOCKS) as u32, 1, 1]
    }
}

/// The multiprocessors of the device if it has these products and can take such factors of theirs: bf16, rows of a multiple of 8
/// values that begin at multiples of 16 bytes.
pub(super) fn multiprocessors(factors: &[&Tensor]) -> Result<Option<i64>> {
    let Device::Cuda(device_idx) = factors[0].device() else { return Ok(None) };
    let properties = DeviceProperties::of(device_idx)?;
    let fits = |factor: &&Tensor| {
        factor.kind() == Kind::BFloat16
            && factor.dim() == 2
            && factor.numel() > 0
            && factor.stride()[1] == 1
            && factor.size()[1] % 8 == 0
            && factor.stride()[0] % 8 == 0
            && (factor.data_ptr() as usize).is_multiple_of(16)
    };
    let has_products = properties.compute_capability == 90 && factors.iter().all(fits);
    Ok(has_products.then_some(i64::from(properties.n_multiprocessors)))
}

/// A matrix that warps send, or ask for, by 16 rows.
pub(super) fn sent(matrix: &Tensor) -> Arg<'_> {
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
                    assert!(i64::from(n_blocks) <= form.n_tiles(n_rows, n_columns) * 2);
                }
            }
        }
    }
}
