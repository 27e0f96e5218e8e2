//! [`embedding`](crate::embedding) on CUDA: a gather forward, sums over sorted ids backward.
// v vocab_size, d d_model

use tch::{Kind, Tensor};

use flowhn_torch::kernel::rows::with_dense_rows;
use flowhn_torch::kernel::{Arg, Kernel, kind_define};
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result};

use crate::kernels::EMBEDDING;

/// Tokens of one id that are added up ahead of the others.
pub(crate) const CHUNK: i64 = 32;
/// Rows of the table that a block of the backward owns, `ROWS` of `embedding.cu`.
const ROWS: i64 = 32;

pub(crate) struct EmbeddingCuda {
    padding_idx: Option<i64>,
    kind: Kind,
    vocab_size: i64,
}

impl EmbeddingCuda {
    pub(crate) fn new(padding_idx: Option<i64>, kind: Kind) -> Self {
        Self { padding_idx, kind, vocab_size: 0 }
    }
}

impl Function for EmbeddingCuda {
    const NAME: &'static str = "embedding";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let (table, ids) = (inputs[0].f_contiguous()?, inputs[1].f_contiguous()?);
        let (vocab_size, d) = table.size2()?;
        self.vocab_size = vocab_size;
        let mut shape = ids.size();
        shape.push(d);
        let x = Tensor::f_empty(shape, (self.kind, table.device()))?;
        let n_tokens = ids.numel() as i64;
        if n_tokens * d > 0 {
            let vec = vector_len(8, d, d, &[&table, &x]);
            let n_words = n_tokens * (d / vec);
            let args = [
                Arg::Tensor(&table),
                Arg::Tensor(&ids),
                Arg::Tensor(&x),
                Arg::I64(n_tokens),
                Arg::I32(d as i32),
                Arg::I64(vocab_size),
            ];
            kernel("embedding_forward", &defines(kind_define(Self::NAME, "x", &x)?, vec)).launch(
                blocks(n_words, 256)?,
                256,
                0,
                &args,
            )?;
        }
        if ctx.is_recorded() {
            ctx.save(&ids);
        }
        Ok(vec![x])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let d = grads[0].size().last().copied().unwrap_or(0);
        let dx = with_dense_rows(&grads[0].f_reshape([-1, d])?)?;
        let dtable = Tensor::f_empty([self.vocab_size, d], (Kind::Float, dx.device()))?;
        if dtable.numel() == 0 {
            return Ok(vec![Some(dtable), None]);
        }
        let n_tokens = dx.size()[0];
        if i32::try_from(n_tokens.max(self.vocab_size)).is_err() {
            let message = format!("{n_tokens} tokens are more than the CUDA kernel counts; split the batch");
            return Err(Error::invalid(Self::NAME, message));
        }
        // Equal ids become neighbours and keep their order, so each sum runs in the order of the tokens.
        // Four bytes sort faster than eight; what does not fit them is outside the vocabulary in any case.
        let ids = ctx.saved()[0].f_view([-1])?.f_clamp(-1, self.vocab_size)?.f_to_kind(Kind::Int)?;
        let (sorted, order) = ids.f_sort_stable(true, 0, false)?;
        let n_chunks = n_tokens / CHUNK;
        let parts = Tensor::f_empty([n_chunks, d], (Kind::Float, dx.device()))?;
        let row_stride = dx.stride()[0];
        let defines = defines(kind_define(Self::NAME, "x", &dx)?, vector_len(4, d, row_stride, &[&dx]));
        let rows =
            [Arg::Tensor(&sorted), Arg::Tensor(&order), Arg::Tensor(&dx), Arg::I64(row_stride), Arg::Tensor(&parts)];
        let args = [&rows[..], &[Arg::I32(d as i32)]].concat();
        kernel("embedding_parts", &defines).launch(blocks(n_chunks, 1)?, 256, 0, &args)?;
        let sizes = [n_tokens, d, self.vocab_size, self.padding_idx.unwrap_or(-1)].map(|size| Arg::I32(size as i32));
        let args = [&rows[..], &[Arg::Tensor(&dtable)], &sizes].concat();
        kernel("embedding_backward", &defines).launch(blocks(self.vocab_size, ROWS)?, 256, 0, &args)?;
        Ok(vec![Some(dtable), None])
    }
}

/// Neighbours of a thread: the most, up to `widest`, that are aligned words in rows of `d` elements, `row_stride`
/// apart.
fn vector_len(widest: i64, d: i64, row_stride: i64, tensors: &[&Tensor]) -> i64 {
    // Words are 16 bytes at most.
    let bytes = |vec: i64, tensor: &Tensor| (vec as usize * tensor.kind().elt_size_in_bytes()).min(16);
    let fits = |vec: i64| {
        let is_aligned = |tensor: &&Tensor| (tensor.data_ptr() as usize).is_multiple_of(bytes(vec, tensor));
        d % vec == 0 && row_stride % vec == 0 && tensors.iter().all(is_aligned)
    };
    [8, 4].into_iter().find(|&vec| vec <= widest && fits(vec)).unwrap_or(1)
}

/// The macros of `embedding.cu`.
pub(crate) const fn defines(x_kind: i64, vec: i64) -> [(&'static str, i64); 3] {
    [("X_KIND", x_kind), ("VEC", vec), ("CHUNK", CHUNK)]
}

/// A grid of blocks that take `per_block` of `n` each.
fn blocks(n: i64, per_block: i64) -> Result<[u32; 3]> {
    let n_blocks = (n + per_block - 1) / per_block;
    match i32::try_from(n_blocks) {
        Ok(n_blocks) => Ok([n_blocks as u32, 1, 1]),
        Err(_) => {
            Err(Error::invalid("embedding", format!("{n_blocks} blocks are more than a launch has; split the batch")))
        }
    }
}

fn kernel<'a>(entry: &'static str, defines: &'a [(&'static str, i64)]) -> Kernel<'a> {
    Kernel { source: &EMBEDDING, entry, defines }
}
