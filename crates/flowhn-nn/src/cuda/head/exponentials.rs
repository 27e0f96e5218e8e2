//! The head on Hopper: the first product is ours and leaves exponentials, whose rows' factors the other two products take along, so that
//! nothing passes over a chunk between them.
// r rows of a chunk, d d_model, v vocab_size

use tch::{Device, Kind, Tensor};

use flowhn_torch::kernel::Arg;
use flowhn_torch::{DeviceProperties, Result, op};

use crate::kernels::{LM_HEAD_PACK, LM_HEAD_PRODUCT, LM_HEAD_ROWS};

use super::{FLOAT, Gradients, Head, TILE_ROWS, chunk_rows, kernel};

/// Words of a tile of the product and values of k of a stage, as in `lm_head_tiles.cuh`; its rows are [`TILE_ROWS`].
const TILE_COLS: i64 = 256;
const TILE_K: i64 = 64;
/// Rows that a block of `lm_head_pack.cu` and `lm_head_rows.cu` takes.
const BLOCK_ROWS: i64 = 8;
/// The widest row that a block of `lm_head_finish` can hold in shared memory.
const MAX_WIDTH: i64 = 32_768;

/// What all chunks share.
pub(super) struct Exponentials<'a> {
    head: &'a Head,
    d_model: i64,
    n_multiprocessors: i64,
    weight_tiles: Tensor,
}

/// The memory of a chunk, which all chunks take in turn.
struct Chunk {
    n_rows: i64,
    /// x in tiles, which the product takes; from then on, x times the factors of its rows.
    x: Tensor,
    /// `[r]`, what the exponentials are measured from.
    origins: Tensor,
    /// `[column tiles, r]`, of the exponentials.
    sums: Tensor,
    gradient: Option<ChunkGradient>,
}

/// What of a chunk only gradients need.
struct ChunkGradient {
    /// `[r, v]`, bf16.
    exponentials: Tensor,
    /// `[r]`, f32.
    factors: Tensor,
    /// `[r, d]`, f32: dx before its rows have their factors.
    product: Tensor,
}

/// The rows of the arguments that belong to a chunk.
struct Rows {
    x: Tensor,
    targets: Tensor,
    losses: Tensor,
    n_rows: i64,
}

impl<'a> Exponentials<'a> {
    /// `None` where this way does not fit. It takes bf16 on compute capability 9.0, aligned to 16 bytes, and rows of a multiple of 64 up
    /// to 32768; any number of rows and words.
    pub(super) fn new(head: &'a Head) -> Result<Option<Self>> {
        let Device::Cuda(device_idx) = head.x.device() else { return Ok(None) };
        let properties = DeviceProperties::of(device_idx)?;
        let d_model = head.x.size()[1];
        let is_aligned = |tensor: &Tensor| (tensor.data_ptr() as usize).is_multiple_of(16);
        let fits = properties.compute_capability == 90
            && head.x.kind() == Kind::BFloat16
            && (TILE_K..=MAX_WIDTH).contains(&d_model)
            && d_model % TILE_K == 0
            && head.n_tokens > 0
            && is_aligned(&head.x)
            && is_aligned(&head.weight);
        if !fits {
            return Ok(None);
        }
        let n_words = up_to(head.vocab_size, TILE_COLS);
        let weight_tiles = head.empty(&[n_words, d_model], Kind::BFloat16)?;
        let sizes = [head.vocab_size, d_model].map(|size| Arg::I32(size as i32));
        kernel(&LM_HEAD_PACK, "lm_head_pack_weight", &[]).launch(
            row_blocks(n_words),
            256,
            0,
            &[&[Arg::Tensor(&head.weight), Arg::Tensor(&weight_tiles)], &sizes[..]].concat(),
        )?;
        let n_multiprocessors = i64::from(properties.n_multiprocessors);
        Ok(Some(Self { head, d_model, n_multiprocessors, weight_tiles }))
    }

    /// The loss of each token; fills the gradients on the way.
    pub(super) fn losses(&self, mut gradients: Option<&mut Gradients>) -> Result<Tensor> {
        let Head { x, targets, n_tokens, vocab_size, .. } = self.head;
        let losses = self.head.floats(&[*n_tokens])?;
        let chunk = self.chunk(gradients.is_some())?;
        for start in (0..*n_tokens).step_by(chunk.n_rows as usize) {
            let n_rows = chunk.n_rows.min(n_tokens - start);
            let part = |tensor: &Tensor| tensor.f_narrow(0, start, n_rows);
            let rows = Rows { x: part(x)?, targets: part(targets)?, losses: part(&losses)?, n_rows };
            self.exponentials(&chunk, &rows)?;
            self.finish(&chunk, &rows, gradients.as_ref().map(|gradients| &gradients.scale))?;
            let (Some(Gradients { dx, dweight, .. }), Some(gradient)) = (gradients.as_deref_mut(), &chunk.gradient)
            else {
                continue;
            };
            let exponentials = gradient.exponentials.f_narrow(0, 0, n_rows)?.f_narrow(1, 0, *vocab_size)?;
            if let Some(dx) = dx {
                self.input_gradient(&exponentials, gradient, &part(dx)?)?;
            }
            if let Some(dweight) = dweight {
                dweight.add_product(&exponentials, &chunk.x.f_narrow(0, 0, n_rows)?)?;
            }
        }
        Ok(losses)
    }

    fn chunk(&self, with_gradient: bool) -> Result<Chunk> {
        let (head, d) = (self.head, self.d_model);
        let n_column_tiles = up_to(head.vocab_size, TILE_COLS) / TILE_COLS;
        // What is small beside the exponentials, 5 % at most, is not counted; rows that are a power of two suit the products best.
        let row_bytes = if with_gradient { 2 * self.row_stride() } else { 2 * d + 4 * n_column_tiles };
        let n_rows = chunk_rows(head.n_tokens, row_bytes);
        let n_padded = up_to(n_rows, TILE_ROWS);
        let gradient = || -> Result<ChunkGradient> {
            Ok(ChunkGradient {
                exponentials: head.empty(&[n_rows, self.row_stride()], Kind::BFloat16)?,
                factors: head.floats(&[n_rows])?,
                product: head.floats(&[n_rows, d])?,
            })
        };
        Ok(Chunk {
            n_rows,
            x: head.empty(&[n_padded, d], Kind::BFloat16)?,
            origins: head.floats(&[n_padded])?,
            sums: head.floats(&[n_column_tiles, n_padded])?,
            gradient: with_gradient.then(gradient).transpose()?,
        })
    }

    /// The exponentials of a chunk and their sums in the column tiles.
    fn exponentials(&self, chunk: &Chunk, rows: &Rows) -> Result<()> {
        let n_padded = up_to(rows.n_rows, TILE_ROWS);
        let tensors = [Arg::Tensor(&rows.x), Arg::Tensor(&self.weight_tiles), Arg::Tensor(&rows.targets)];
        let results = [Arg::I64(self.head.ignore_index), Arg::Tensor(&chunk.x), Arg::Tensor(&chunk.origins)];
        kernel(&LM_HEAD_PACK, "lm_head_pack_x", &[]).launch(
            row_blocks(n_padded),
            256,
            0,
            &[&tensors[..], &results, &self.sizes(rows, self.d_model)].concat(),
        )?;
        let variant = ProductVariant { stores: chunk.gradient.is_some() };
        let n_tiles = n_padded / TILE_ROWS * (up_to(self.head.vocab_size, TILE_COLS) / TILE_COLS);
        let tensors = [&chunk.x, &self.weight_tiles, &rows.targets, &chunk.origins].map(Arg::Tensor);
        let exponentials = chunk.gradient.as_ref().map(|gradient| &gradient.exponentials);
        let results = [Arg::opt(exponentials), Arg::I64(self.row_stride()), Arg::Tensor(&chunk.sums)];
        kernel(&LM_HEAD_PRODUCT, "lm_head_product", &variant.defines()).launch(
            [n_tiles.min(self.n_multiprocessors) as u32, 1, 1],
            ProductVariant::N_THREADS,
            ProductVariant::SHARED_BYTES,
            &[&tensors[..], &results, &self.sizes(rows, self.d_model / TILE_K)].concat(),
        )
    }

    /// The losses of a chunk, and what the gradients need: the targets' elements of the exponentials, the rows' factors, and x times these.
    fn finish(&self, chunk: &Chunk, rows: &Rows, scale: Option<&Tensor>) -> Result<()> {
        let gradient = chunk.gradient.as_ref();
        let defines = [("GRAD", gradient.is_some().into())];
        let tensors = [&chunk.sums, &rows.x, &self.weight_tiles, &rows.targets].map(Arg::Tensor);
        let results = [
            Arg::I64(self.head.ignore_index),
            Arg::opt(scale),
            Arg::opt(gradient.map(|gradient| &gradient.exponentials)),
            Arg::I64(self.row_stride()),
            Arg::Tensor(&rows.losses),
            Arg::opt(gradient.map(|gradient| &gradient.factors)),
            Arg::Tensor(&chunk.x),
        ];
        kernel(&LM_HEAD_ROWS, "lm_head_finish", &defines).launch(
            row_blocks(rows.n_rows),
            256,
            self.d_model as usize * size_of::<f32>(),
            &[&tensors[..], &results, &self.sizes(rows, self.d_model)].concat(),
        )
    }

    /// dx, from a product that stays f32 until its rows have their factors.
    fn input_gradient(&self, exponentials: &Tensor, gradient: &ChunkGradient, dx: &Tensor) -> Result<()> {
        let n_rows = dx.size()[0];
        let product = gradient.product.f_narrow(0, 0, n_rows)?;
        let [factor_a, factor_b, out] = [exponentials, &self.head.weight, &product].map(op::Arg::Tensor);
        op::call("aten::mm", "dtype_out", &[factor_a, factor_b, FLOAT, out])?;
        let tensors = [&product, &gradient.factors, dx].map(Arg::Tensor);
        let sizes = [n_rows, self.d_model].map(|size| Arg::I32(size as i32));
        kernel(&LM_HEAD_ROWS, "lm_head_scale", &[("GRAD", 1)]).launch(
            row_blocks(n_rows),
            256,
            0,
            &[&tensors[..], &sizes].concat(),
        )
    }

    /// Rows, words and a size of a row, as the kernels take them.
    fn sizes(&self, rows: &Rows, row: i64) -> [Arg<'static>; 3] {
        [rows.n_rows, self.head.vocab_size, row].map(|size| Arg::I32(size as i32))
    }

    /// Rows of exponentials begin at 16 bytes, whatever the vocabulary.
    fn row_stride(&self) -> i64 {
        up_to(self.head.vocab_size, 8)
    }
}

/// The macros of `lm_head_sm90.cu`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProductVariant {
    /// Whether the exponentials are written, not only added up.
    pub(crate) stores: bool,
}

impl ProductVariant {
    const STAGES: i64 = 4;
    /// A group that copies and two that multiply, of four warps each.
    const N_THREADS: u32 = 384;
    /// A stage has 64 values of k of 128 rows and 256 words and two barriers; one more barrier is for the groups.
    const SHARED_BYTES: usize = Self::STAGES as usize * (2 * 64 * (128 + 256) + 2 * 8) + 8;

    pub(crate) const fn defines(self) -> [(&'static str, i64); 3] {
        [("STAGES", Self::STAGES), ("LAG", 2), ("STORE", self.stores as i64)]
    }
}

/// The next multiple of `step`.
fn up_to(n: i64, step: i64) -> i64 {
    (n + step - 1) / step * step
}

/// A grid for this many rows.
fn row_blocks(n_rows: i64) -> [u32; 3] {
    [(up_to(n_rows, BLOCK_ROWS) / BLOCK_ROWS) as u32, 1, 1]
}
