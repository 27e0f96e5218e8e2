//! The head on Hopper: the first product is ours and leaves exponentials, whose rows' factors the other two products take along, so that
//! nothing passes over a chunk between them.
// r rows of a chunk, d d_model, v vocab_size

use tch::{Kind, Tensor};

use flowhn_torch::kernel::{Arg, Kernel};
use flowhn_torch::{Result, Sum, product_into};

use super::super::product_sm90::{Form, MAX_ROWS, Macros, TILE_ROWS, factor, fits, multiprocessors, panels, up_to};
use super::{Gradients, Head, chunk_rows, kernel};
use crate::kernels::{LM_HEAD_PRODUCT, LM_HEAD_ROWS};

/// Rows that a block of `lm_head_rows.cu` takes.
const BLOCK_ROWS: i64 = 8;
/// The widest row that a block of `lm_head_finish` can hold in shared memory.
const MAX_WIDTH: i64 = 32_768;
/// The tiles of the product.
const FORM: Form = Form { columns: 256, stages: 4, places: 2 };
/// Rows begin at 16 bytes and so are of a multiple of this many bf16 values.
const PIECE: i64 = 8;

/// What all chunks share.
pub(super) struct Exponentials<'a> {
    head: &'a Head,
    d_model: i64,
    n_multiprocessors: i64,
    /// `[t]`, what the exponentials are measured from; once these are there, the factors of their rows.
    origins: Tensor,
}

/// The memory of a chunk, which all chunks take in turn.
struct Chunk {
    n_rows: i64,
    /// `[column tiles, r]`, of the exponentials, where they cannot lie in dx.
    sums: Option<Tensor>,
    gradient: Option<ChunkGradient>,
}

/// What of a chunk only gradients need.
struct ChunkGradient {
    /// `[r, v]`, bf16.
    exponentials: Tensor,
    /// `[r, d]`, bf16: x times the factors of its rows, where that cannot lie in dx.
    scaled: Option<Tensor>,
}

/// The rows of the arguments that belong to a chunk.
struct Rows {
    x: Tensor,
    targets: Tensor,
    origins: Tensor,
    losses: Tensor,
    sums: Tensor,
    dx: Option<Tensor>,
    /// x times the factors of its rows, if the gradient of the weight is wanted.
    scaled: Option<Tensor>,
    n_rows: i64,
}

impl<'a> Exponentials<'a> {
    /// `None` where this way does not fit. It takes bf16 on compute capability 9.0, aligned to 16 bytes, and rows of a multiple of 8 up
    /// to 32768; any number of rows and words.
    pub(super) fn new(head: &'a Head) -> Result<Option<Self>> {
        let d_model = head.x.size()[1];
        let takes = fits(&head.x) && fits(&head.weight) && d_model <= MAX_WIDTH;
        let counts = head.n_tokens.max(head.vocab_size) <= MAX_ROWS;
        let Some(n_multiprocessors) = multiprocessors(head.x.device())?.filter(|_| takes && counts) else {
            return Ok(None);
        };
        let origins = head.floats(&[head.n_tokens])?;
        let tensors = [&head.x, &head.weight, &head.targets].map(Arg::Tensor);
        let sizes = [head.n_tokens, head.vocab_size, d_model].map(|size| Arg::I32(size as i32));
        kernel(&LM_HEAD_ROWS, "lm_head_origins", &GRAD).launch(
            row_blocks(head.n_tokens),
            256,
            0,
            &[&tensors[..], &[Arg::I64(head.ignore_index), Arg::Tensor(&origins)], &sizes].concat(),
        )?;
        Ok(Some(Self { head, d_model, n_multiprocessors, origins }))
    }

    /// The loss of each token; fills the gradients on the way.
    pub(super) fn losses(self, mut gradients: Option<&mut Gradients>) -> Result<Tensor> {
        let Head { x, targets, n_tokens, .. } = self.head;
        let losses = self.head.floats(&[*n_tokens])?;
        let chunk = self.chunk(gradients.as_deref())?;
        for start in (0..*n_tokens).step_by(chunk.n_rows as usize) {
            let n_rows = chunk.n_rows.min(n_tokens - start);
            let part = |tensor: &Tensor| tensor.f_narrow(0, start, n_rows);
            let dx = gradients.as_deref().and_then(|gradients| gradients.dx.as_ref()).map(part).transpose()?;
            let scaled = match (&chunk.gradient, gradients.as_deref()) {
                (Some(ChunkGradient { scaled: Some(scaled), .. }), _) => Some(scaled.f_narrow(0, 0, n_rows)?),
                (_, Some(Gradients { dweight: Some(_), .. })) => dx.as_ref().map(Tensor::shallow_clone),
                _ => None,
            };
            let (targets, origins, losses) = (part(targets)?, part(&self.origins)?, part(&losses)?);
            let sums = match (&chunk.sums, &dx) {
                (None, Some(dx)) => dx.f_view_dtype(Kind::Float)?,
                (sums, _) => sums.as_ref().map(Tensor::shallow_clone).expect("a chunk without room in dx has its own"),
            };
            let rows = Rows { x: part(x)?, targets, origins, losses, sums, dx, scaled, n_rows };
            self.exponentials(&chunk, &rows)?;
            self.finish(&chunk, &rows, gradients.as_ref().map(|gradients| &gradients.scale))?;
            let (Some(Gradients { dweight, .. }), Some(gradient)) = (gradients.as_deref_mut(), &chunk.gradient) else {
                continue;
            };
            let exponentials = gradient.exponentials.f_narrow(0, 0, n_rows)?.f_narrow(1, 0, self.head.vocab_size)?;
            // First the weight's, whose factor may lie where dx comes.
            if let (Some(dweight), Some(scaled)) = (dweight, &rows.scaled) {
                self.scale(&rows.x, &rows.origins, scaled)?;
                dweight.add_product(&exponentials, scaled)?;
            }
            if let Some(dx) = &rows.dx {
                product_into(&exponentials, &self.head.weight, dx, Sum::New)?;
                self.scale(dx, &rows.origins, dx)?;
            }
        }
        Ok(losses)
    }

    fn chunk(&self, gradients: Option<&Gradients>) -> Result<Chunk> {
        let (head, d) = (self.head, self.d_model);
        let (wants_dx, wants_dweight) =
            gradients.map_or((false, false), |gradients| (gradients.dx.is_some(), gradients.dweight.is_some()));
        let n_column_tiles = up_to(head.vocab_size, FORM.columns) / FORM.columns;
        let has_scaled = wants_dweight && !wants_dx;
        let row_bytes = if gradients.is_some() { 2 * self.row_stride() } else { 4 * n_column_tiles };
        let n_rows = chunk_rows(head.n_tokens, row_bytes, head.logits_bytes);
        let gradient = || -> Result<ChunkGradient> {
            Ok(ChunkGradient {
                exponentials: head.empty(&[n_rows, self.row_stride()], Kind::BFloat16)?,
                scaled: has_scaled.then(|| head.empty(&[n_rows, d], Kind::BFloat16)).transpose()?,
            })
        };
        // Until dx comes, its rows hold the sums, then x times the factors.
        let rest = head.n_tokens % n_rows;
        let fits_dx = |n_rows: i64| 4 * n_column_tiles * up_to(n_rows, TILE_ROWS) <= 2 * d * n_rows;
        let lies_in_dx = wants_dx && fits_dx(n_rows) && (rest == 0 || fits_dx(rest));
        let sums = || head.floats(&[n_column_tiles, up_to(n_rows, TILE_ROWS)]);
        Ok(Chunk {
            n_rows,
            sums: (!lies_in_dx).then(sums).transpose()?,
            gradient: gradients.is_some().then(gradient).transpose()?,
        })
    }

    /// The exponentials of a chunk and their sums in the column tiles.
    fn exponentials(&self, chunk: &Chunk, rows: &Rows) -> Result<()> {
        let mut args = vec![factor(&rows.x), factor(&self.head.weight)];
        let stored =
            chunk.gradient.as_ref().map(|gradient| gradient.exponentials.f_narrow(0, 0, rows.n_rows)).transpose()?;
        args.extend(stored.as_ref().map(panels));
        args.extend([&rows.targets, &rows.origins, &rows.sums].map(Arg::Tensor));
        args.extend(self.sizes(rows));
        let defines = if stored.is_some() { &STORE } else { &SUMS_ONLY };
        let kernel = Kernel { source: &LM_HEAD_PRODUCT, entry: "lm_head_product", defines };
        FORM.launch(&kernel, [rows.n_rows, self.head.vocab_size], self.n_multiprocessors, &args)
    }

    /// The losses of a chunk, and what the gradients need: the targets' elements of the exponentials, and the rows' factors.
    fn finish(&self, chunk: &Chunk, rows: &Rows, scale: Option<&Tensor>) -> Result<()> {
        let gradient = chunk.gradient.as_ref();
        let defines = if gradient.is_some() { &GRAD } else { &LOSSES_ONLY };
        let tensors = [&rows.sums, &rows.x, &self.head.weight, &rows.targets].map(Arg::Tensor);
        let results = [
            Arg::I64(self.head.ignore_index),
            Arg::opt(scale),
            Arg::opt(gradient.map(|gradient| &gradient.exponentials)),
            Arg::I64(self.row_stride()),
            Arg::Tensor(&rows.losses),
            Arg::opt(gradient.map(|_| &rows.origins)),
        ];
        kernel(&LM_HEAD_ROWS, "lm_head_finish", defines).launch(
            row_blocks(rows.n_rows),
            256,
            self.d_model as usize * size_of::<f32>(),
            &[&tensors[..], &results, &self.sizes(rows)].concat(),
        )
    }

    /// Writes rows times their factors to `out`, which may be the rows themselves.
    fn scale(&self, rows: &Tensor, factors: &Tensor, out: &Tensor) -> Result<()> {
        let n_rows = rows.size()[0];
        let tensors = [rows, factors, out].map(Arg::Tensor);
        let sizes = [n_rows, self.d_model].map(|size| Arg::I32(size as i32));
        kernel(&LM_HEAD_ROWS, "lm_head_scale", &GRAD).launch(
            row_blocks(n_rows),
            256,
            0,
            &[&tensors[..], &sizes].concat(),
        )
    }

    /// Rows, words and the size of a row, as the kernels take them.
    fn sizes(&self, rows: &Rows) -> [Arg<'static>; 3] {
        [rows.n_rows, self.head.vocab_size, self.d_model].map(|size| Arg::I32(size as i32))
    }

    /// Rows of exponentials begin at 16 bytes, whatever the vocabulary.
    fn row_stride(&self) -> i64 {
        up_to(self.head.vocab_size, PIECE)
    }
}

/// The macros of `lm_head_sm90.cu` that writes exponentials, and of the one that only adds them up.
pub(crate) const STORE: Macros<4> = FORM.defines_and(("STORE", 1));
pub(crate) const SUMS_ONLY: Macros<4> = FORM.defines_and(("STORE", 0));
/// The macros of `lm_head_rows.cu`, which leaves what gradients need, or losses only.
pub(crate) const GRAD: Macros<2> = [("TILE_COLUMNS", FORM.columns), ("GRAD", 1)];
pub(crate) const LOSSES_ONLY: Macros<2> = [("TILE_COLUMNS", FORM.columns), ("GRAD", 0)];

/// A grid for this many rows.
fn row_blocks(n_rows: i64) -> [u32; 3] {
    [(up_to(n_rows, BLOCK_ROWS) / BLOCK_ROWS) as u32, 1, 1]
}
