//! Activations that are rounded where they are computed, for the projection that reads them.

use tch::Tensor;

use flowhn_torch::kernel::Arg;
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, Stream, record_stream};

use super::cast::{Rounded, cast, padded};
use super::scales::Slot;

/// Where activations are left for the projection that reads them: rounded to E4M3 with its scale, in order and transposed.
#[derive(Debug)]
pub struct Fp8Place {
    rounded: Rounded,
    slot: Slot,
    n_rows: i64,
    stand_in: Tensor,
}

impl Fp8Place {
    /// Memory for activations of this shape, `[.., d]` with d a multiple of 16, not yet written. `nan` is one element of bf16.
    pub(super) fn new(shape: &[i64], slot: &Slot, nan: &Tensor) -> Result<Self> {
        let (d, n_rows) = (shape[shape.len() - 1], shape[..shape.len() - 1].iter().product());
        let rounded = Rounded::empty(n_rows, d, true, true, nan, slot.format())?;
        Ok(Self { rounded, slot: slot.clone(), n_rows, stand_in: nan.f_expand(shape, false)? })
    }

    /// What goes through autograd instead of the activations: bf16 in their shape, one NaN for all.
    pub fn stand_in(&self) -> Tensor {
        self.stand_in.shallow_clone()
    }

    /// The rows, `n_padded` with those that are added to make it a multiple of 16.
    pub fn n_padded(&self) -> i64 {
        padded(self.n_rows)
    }

    /// The arguments of a kernel: E4M3 `[n_padded, d]` and `[d, n_padded]`, the numbers of the scale and `n_padded`.
    pub fn args(&self) -> [Arg<'_>; 4] {
        [
            Arg::opt(self.rounded.plain.as_ref()),
            Arg::opt(self.rounded.transposed.as_ref()),
            Arg::Tensor(self.slot.numbers()),
            Arg::I32(self.n_padded() as i32),
        ]
    }

    /// Rounds activations, bf16 in the shape of the place, and returns what stands in for them.
    ///
    /// # Errors
    /// [`Error::Device`] for a device without a way to do it; [`Error::Kernel`] or [`Error::Torch`] if it fails.
    pub fn fill(&self, x: &Tensor) -> Result<Tensor> {
        cast(x, &self.slot, &self.rounded)?;
        Ok(self.stand_in())
    }

    /// The matrix, for a projection that reads activations with this scale.
    pub(super) fn into_rounded(self, slot: &Slot, transposed: bool) -> Result<Rounded> {
        if !slot.is_same(&self.slot) {
            return Err(Error::invalid("linear in fp8", "the activations were rounded for another projection"));
        }
        let Rounded { plain, transposed: columns } = self.rounded;
        Ok(Rounded { plain, transposed: columns.filter(|_| transposed) })
    }
}

impl Clone for Fp8Place {
    /// The same place.
    fn clone(&self) -> Self {
        let Self { rounded: Rounded { plain, transposed }, slot, n_rows, stand_in } = self;
        let [plain, transposed] = [plain, transposed].map(|x| x.as_ref().map(Tensor::shallow_clone));
        let rounded = Rounded { plain, transposed };
        Self { rounded, slot: slot.clone(), n_rows: *n_rows, stand_in: stand_in.shallow_clone() }
    }
}

/// What a projection reads: activations, or what stands in for those that wait for it in fp8.
#[derive(Debug)]
pub struct Activations {
    x: Tensor,
    place: Option<Fp8Place>,
}

impl Activations {
    /// `x` is what a function left that was given the place.
    pub fn new(x: Tensor, place: Option<Fp8Place>) -> Self {
        Self { x, place }
    }

    /// Their shape, dtype and device, and their part in autograd; the values only where they are not in fp8.
    pub fn tensor(&self) -> &Tensor {
        &self.x
    }

    /// The values.
    ///
    /// # Errors
    /// [`Error::Invalid`] where they are in fp8.
    pub fn values(&self) -> Result<&Tensor> {
        match &self.place {
            None => Ok(&self.x),
            Some(_) => Err(Error::invalid("linear", "the activations were rounded for a projection in fp8")),
        }
    }

    /// The same after `f`, which changes no value.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn pass(&self, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { x: f(&self.x)?, place: self.place.clone() })
    }

    /// Keeps their memory until `stream` is done with it.
    ///
    /// # Errors
    /// As [`record_stream`].
    pub fn record_stream(&self, stream: Stream) -> Result<()> {
        let Some(place) = &self.place else { return record_stream(&self.x, stream) };
        let Rounded { plain, transposed } = &place.rounded;
        [plain, transposed].into_iter().flatten().try_for_each(|x| record_stream(x, stream))
    }

    pub(crate) fn into_parts(self) -> (Tensor, Option<Fp8Place>) {
        (self.x, self.place)
    }
}

impl From<Tensor> for Activations {
    fn from(x: Tensor) -> Self {
        Self::new(x, None)
    }
}

impl From<&Tensor> for Activations {
    fn from(x: &Tensor) -> Self {
        Self::new(x.shallow_clone(), None)
    }
}

impl From<&Activations> for Activations {
    fn from(x: &Activations) -> Self {
        Self::new(x.x.shallow_clone(), x.place.clone())
    }
}

/// A function with one of its outputs rounded to where it is read.
pub struct Rounding<F> {
    inner: F,
    output_idx: usize,
    place: Option<Fp8Place>,
}

impl<F> Rounding<F> {
    /// Output `output_idx` of `inner`, bf16, goes to `place`; without a place it stays as it is.
    pub fn new(inner: F, output_idx: usize, place: Option<Fp8Place>) -> Self {
        Self { inner, output_idx, place }
    }
}

impl<F: Function> Function for Rounding<F> {
    const NAME: &'static str = F::NAME;

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let mut outputs = self.inner.forward(ctx, inputs)?;
        // The function lives until the backward pass is through; the place belongs to its reader.
        if let Some(place) = self.place.take() {
            outputs[self.output_idx] = place.fill(&outputs[self.output_idx])?;
        }
        Ok(outputs)
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        self.inner.backward(ctx, grads)
    }
}
