//! Features that leave one matrix product side by side, taken apart for the operations that follow.

use std::cell::RefCell;

use tch::{Device, Kind, Tensor};

use crate::{BackwardCtx, Error, ForwardCtx, Function, Result, apply};

/// Cuts the last axis of `x` into pieces and gives each a shape: views, whose gradients come back as one tensor.
///
/// Backward, an operation written in Rust that asks [`BackwardCtx::grad_place`] writes the gradient of its piece where it
/// belongs in the gradient of `x`, so that nothing is copied; the gradients of other operations are copied there once. Plain views
/// would each cost a tensor of zeros as large as `x`, a copy and an addition.
///
/// # Shapes
/// - `x`: `[.., w]`
/// - `pieces`: the last axes of each piece; their sizes add up to `w`
/// - returns `[.., piece]` for each
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// let x = Tensor::arange(12, (Kind::Float, Device::Cpu)).reshape([2, 6]);
/// let pieces = flowhn_torch::split_features(&x, &[&[2], &[2, 2]])?;
/// assert_eq!(pieces[0].size(), [2, 2]);
/// assert_eq!(pieces[1].size(), [2, 2, 2]);
/// assert_eq!(pieces[1].double_value(&[1, 0, 1]), 9.);
/// # Ok::<(), flowhn_torch::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] if the pieces do not add up to the last axis.
pub fn split_features(x: &Tensor, pieces: &[&[i64]]) -> Result<Vec<Tensor>> {
    let size = x.size();
    let shapes: Vec<Vec<i64>> = pieces.iter().map(|piece| piece.to_vec()).collect();
    let width: i64 = shapes.iter().map(|shape| shape.iter().product::<i64>()).sum();
    if size.last() != Some(&width) {
        let want = format!("[.., {width}], the sum of the pieces {shapes:?}");
        return Err(Error::Shape { op: SplitFeatures::NAME, arg: "x", got: size, want });
    }
    apply(SplitFeatures { size, shapes, kind: x.kind(), device: x.device(), gradient: RefCell::default() }, &[x])
}

struct SplitFeatures {
    /// Of the whole.
    size: Vec<i64>,
    /// The last axes of each piece.
    shapes: Vec<Vec<i64>>,
    kind: Kind,
    device: Device,
    gradient: RefCell<Gradient>,
}

/// The gradient of the whole while its pieces are written.
#[derive(Default)]
struct Gradient {
    whole: Option<Tensor>,
    /// Whether each piece has been given away. A second user of a piece writes elsewhere: autograd adds its gradient to the first.
    given: Vec<bool>,
}

impl SplitFeatures {
    /// Each piece of a tensor like the whole.
    fn pieces(&self, whole: &Tensor) -> Result<Vec<Tensor>> {
        let mut start = 0;
        let piece = |shape: &Vec<i64>| {
            let width = shape.iter().product();
            let flat = whole.f_narrow(-1, start, width)?;
            start += width;
            Ok(if shape.len() == 1 { flat } else { flat.f_unflatten(-1, shape.as_slice())? })
        };
        self.shapes.iter().map(piece).collect()
    }

    fn place(&self, idx: usize) -> Result<Option<Tensor>> {
        let mut gradient = self.gradient.borrow_mut();
        gradient.given.resize(self.shapes.len(), false);
        if std::mem::replace(&mut gradient.given[idx], true) {
            return Ok(None);
        }
        if gradient.whole.is_none() {
            gradient.whole = Some(Tensor::f_empty(self.size.as_slice(), (self.kind, self.device))?);
        }
        let whole = gradient.whole.as_ref().map(|whole| self.pieces(whole)).transpose()?;
        Ok(whole.map(|mut pieces| pieces.swap_remove(idx)))
    }
}

impl Function for SplitFeatures {
    const NAME: &'static str = "split_features";

    fn forward(&mut self, _ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        self.pieces(inputs[0])
    }

    fn backward(&self, _ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let Some(whole) = self.gradient.take().whole else {
            let flat = |(grad, shape): (&Tensor, &Vec<i64>)| -> Result<Tensor> {
                let mut size = self.size[..self.size.len() - 1].to_vec();
                size.push(shape.iter().product());
                Ok(grad.f_reshape(size)?)
            };
            let flat = grads.iter().zip(&self.shapes).map(flat).collect::<Result<Vec<Tensor>>>()?;
            return Ok(vec![Some(Tensor::f_cat(&flat, -1)?)]);
        };
        for (place, grad) in self.pieces(&whole)?.iter_mut().zip(grads) {
            if place.data_ptr() != grad.data_ptr() || place.stride() != grad.stride() {
                place.f_copy_(grad)?;
            }
        }
        Ok(vec![Some(whole)])
    }

    fn grad_place(&self, output_idx: usize) -> Option<Tensor> {
        self.place(output_idx).ok().flatten()
    }
}
