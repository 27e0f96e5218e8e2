//! Sums over all rows, of each column: a kernel's blocks add up the rows that they take, and a second kernel the blocks.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::{Arg, Kernel, KernelSource, KernelSpec};
use crate::Result;

static COLUMN_SUMS: KernelSource =
    KernelSource { name: "column_sums.cu", text: include_str!("../../kernels/column_sums.cu"), headers: &[] };

pub(super) const KERNELS: KernelSpec = KernelSpec { source: &COLUMN_SUMS, variants: &[&[]] };

/// Threads and columns of a block, `THREADS` and `COLUMNS` of the kernel.
const THREADS: u32 = 256;
const COLUMNS: u32 = 8;

/// Room for what the blocks of a kernel add up, `[n_blocks, d]`, f32, and for the sums over them.
///
/// All of it is there before the kernel runs: with its memory filled in deterministic mode, libtorch would put a kernel of its own between
/// the two.
#[derive(Debug)]
pub struct ColumnSums {
    partials: Option<Tensor>,
    sums: Vec<Sum>,
}

#[derive(Debug)]
struct Sum {
    blocks: Range<i64>,
    total: Option<Tensor>,
}

impl ColumnSums {
    /// Room, unwritten, for sums over so many neighbouring blocks each, of those that are wanted.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) where there is no memory.
    pub fn new(sums: &[(i64, bool)], d: i64, device: Device) -> Result<Self> {
        let empty = |size: &[i64]| Tensor::f_empty(size, (Kind::Float, device));
        let mut n_blocks = 0;
        let room = |&(n, wanted): &(i64, bool)| -> Result<Sum> {
            n_blocks += n;
            Ok(Sum { blocks: n_blocks - n..n_blocks, total: wanted.then(|| empty(&[d])).transpose()? })
        };
        let sums: Vec<Sum> = sums.iter().map(room).collect::<Result<_>>()?;
        let is_wanted = sums.iter().any(|sum| sum.total.is_some());
        Ok(Self { partials: is_wanted.then(|| empty(&[n_blocks, d])).transpose()?, sums })
    }

    /// Where block `i` writes row `i`; null if nothing is wanted.
    pub fn arg(&self) -> Arg<'_> {
        Arg::opt(self.partials.as_ref())
    }

    /// Each sum over its blocks, `[d]`, in a fixed order; none for those that are not wanted.
    ///
    /// To be called behind the launch of the kernel that writes the rows, in the same stream.
    ///
    /// # Errors
    /// As [`Kernel::launch`].
    pub fn totals(self, kind: Kind) -> Result<Vec<Option<Tensor>>> {
        let partials = self.partials.as_ref();
        let total = |Sum { blocks, total }: Sum| {
            let Some((partials, total)) = partials.zip(total) else { return Ok(None) };
            add(&partials.f_narrow(0, blocks.start, blocks.end - blocks.start)?, &total)?;
            Ok(Some(total.f_to_kind(kind)?))
        };
        self.sums.into_iter().map(total).collect()
    }
}

fn add(partials: &Tensor, total: &Tensor) -> Result<()> {
    let (n_partials, d) = partials.size2()?;
    let kernel = Kernel { source: &COLUMN_SUMS, entry: "column_sums", defines: &[] };
    let args = [Arg::Tensor(partials), Arg::Tensor(total), Arg::I32(n_partials as i32), Arg::I32(d as i32)];
    kernel.launch_early([(d as u32).div_ceil(COLUMNS), 1, 1], THREADS, 0, &args)
}
