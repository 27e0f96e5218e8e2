//! Sums that wait for their reader.

use tch::Tensor;

use flowhn_torch::{Result, Stream, record_stream};

/// `x + change`, not added yet: the kernel that reads the sum next adds in its own pass.
#[derive(Debug)]
pub struct Residual {
    /// The tokens, `[batch, seq_len, d]`.
    pub x: Tensor,
    /// What a sublayer adds to them, of the same shape and dtype.
    pub change: Option<Tensor>,
}

impl Residual {
    /// Tokens to which nothing is added.
    pub fn of(x: Tensor) -> Self {
        Self { x, change: None }
    }

    /// `x + change`.
    ///
    /// # Errors
    /// [`flowhn_torch::Error::Torch`] if the shapes or dtypes differ.
    pub fn sum(&self) -> Result<Tensor> {
        match &self.change {
            Some(change) => Ok(self.x.f_add(change)?),
            None => Ok(self.x.shallow_clone()),
        }
    }

    /// The same with `f` of the term that was computed last.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn map_last(self, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Self> {
        match &self.change {
            Some(change) => Ok(Self { change: Some(f(change)?), x: self.x }),
            None => Ok(Self { x: f(&self.x)?, change: None }),
        }
    }

    /// Keeps the memory of both terms until `stream` is done with it.
    ///
    /// # Errors
    /// As [`record_stream`].
    pub fn record_stream(&self, stream: Stream) -> Result<()> {
        [Some(&self.x), self.change.as_ref()].into_iter().flatten().try_for_each(|x| record_stream(x, stream))
    }
}
