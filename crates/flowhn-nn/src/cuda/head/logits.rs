//! The head by libtorch's products and one kernel between them, which turns a chunk's logits into their gradient in place.
// r rows of a chunk, v vocab_size

use tch::Tensor;

use flowhn_torch::kernel::{Arg, kind_define};
use flowhn_torch::{Result, Sum, product_into};

use crate::kernels::CROSS_ENTROPY;

use super::{Gradients, Head, chunk_rows, kernel};

/// What all chunks share.
pub(super) struct Logits<'a> {
    head: &'a Head,
    x_kind: i64,
}

impl<'a> Logits<'a> {
    pub(super) fn new(head: &'a Head) -> Result<Self> {
        Ok(Self { head, x_kind: kind_define(head.op, "x_td", &head.x)? })
    }

    pub(super) fn losses(&self, mut gradients: Option<&mut Gradients>) -> Result<Tensor> {
        let Head { x, weight, targets, n_tokens, vocab_size, .. } = self.head;
        let losses = self.head.floats(&[*n_tokens])?;
        // Rows begin at 16 bytes, whatever the vocabulary.
        let row_stride = (vocab_size + 7) / 8 * 8;
        let row_bytes = row_stride * x.kind().elt_size_in_bytes() as i64;
        let n_rows = chunk_rows(*n_tokens, row_bytes, self.head.logits_bytes);
        let buffer = self.head.empty(&[n_rows, row_stride], x.kind())?;
        let weight_t = weight.f_tr()?;
        for start in (0..*n_tokens).step_by(n_rows as usize) {
            let n_rows = n_rows.min(n_tokens - start);
            let chunk = |tensor: &Tensor| tensor.f_narrow(0, start, n_rows);
            let (x, targets, losses) = (chunk(x)?, chunk(targets)?, chunk(&losses)?);
            let whole_rows = buffer.f_narrow(0, 0, n_rows)?;
            let logits = whole_rows.f_narrow(1, 0, *vocab_size)?;
            let _ = x.f_mm_out(&logits, &weight_t)?;
            self.rows(&whole_rows, &targets, &losses, gradients.as_ref().map(|gradients| &gradients.scale))?;
            let Some(Gradients { dx, dweight, .. }) = gradients.as_deref_mut() else { continue };
            if let Some(dx) = dx {
                product_into(&logits, weight, &chunk(dx)?, Sum::New)?;
            }
            if let Some(dweight) = dweight {
                dweight.add_product(&logits, &x)?;
            }
        }
        Ok(losses)
    }

    /// The losses of a chunk; with a scale, its logits become their gradients. Rows are read and written by 16 bytes, so `logits` has
    /// them with what stands behind their last word.
    fn rows(&self, logits: &Tensor, targets: &Tensor, losses: &Tensor, scale: Option<&Tensor>) -> Result<()> {
        let variant = RowVariant::new(self.x_kind, self.head.vocab_size, scale.is_some());
        kernel(&CROSS_ENTROPY, "cross_entropy_rows", &variant.defines()).launch(
            [logits.size()[0] as u32, 1, 1],
            variant.n_threads as u32,
            0,
            &[
                Arg::Tensor(logits),
                Arg::I64(logits.stride()[0]),
                Arg::Tensor(targets),
                Arg::I64(self.head.ignore_index),
                Arg::opt(scale),
                Arg::Tensor(losses),
                Arg::I32(self.head.vocab_size as i32),
            ],
        )
    }
}

/// The macros of `cross_entropy.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowVariant {
    x_kind: i64,
    n_threads: i64,
    /// 16-byte words of a row that a thread holds; 0 where the row is read as a stream.
    held: i64,
    with_gradient: bool,
}

impl RowVariant {
    /// For the entries that see no rows.
    pub(crate) const WITHOUT_ROWS: Self = Self::new(0, 65_536, false);

    /// The variant for rows of this many logits.
    pub(crate) const fn new(x_kind: i64, vocab_size: i64, with_gradient: bool) -> Self {
        let word = if x_kind == 1 { 8 } else { 4 };
        let n_words = (vocab_size + word - 1) / word;
        let mut variant = Self { x_kind, n_threads: 512, held: 0, with_gradient };
        if !with_gradient {
            return variant;
        }
        // The smallest block of which each thread holds at most 8 words.
        let mut n_threads = 128;
        while n_threads < 1024 && 8 * n_threads < n_words {
            n_threads *= 2;
        }
        if n_words <= 8 * n_threads {
            let mut held = 1;
            while held * n_threads < n_words {
                held *= 2;
            }
            (variant.n_threads, variant.held) = (n_threads, held);
        }
        variant
    }

    pub(crate) const fn defines(&self) -> [(&'static str, i64); 4] {
        [
            ("X_KIND", self.x_kind),
            ("N_THREADS", self.n_threads),
            ("HELD", self.held),
            ("GRAD", self.with_gradient as i64),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_rows_fit_their_blocks() {
        for x_kind in [0, 1] {
            for vocab_size in [1, 7, 1000, 32_000, 32_769, 50_257, 65_536, 65_537, 200_000] {
                let variant = RowVariant::new(x_kind, vocab_size, true);
                let word = if x_kind == 1 { 8 } else { 4 };
                let holds = variant.held * variant.n_threads * word;
                assert!(variant.held == 0 || holds >= vocab_size, "{vocab_size}: {variant:?}");
                assert_eq!(variant.held == 0, vocab_size > 8192 * word, "{vocab_size}: {variant:?}");
            }
        }
    }
}
