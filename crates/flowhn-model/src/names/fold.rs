//! Numbers by which a family multiplies what passes between its matrices, as factors of the matrices themselves.

use tch::{Kind, Tensor};

use crate::Result;

/// What another implementation's tensors are multiplied by on their way into a model of ours, which has no such numbers.
///
/// The empty one leaves every tensor as it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fold {
    /// Ends of their names, with the factors of what is so called.
    factors: Vec<(&'static str, Factors)>,
}

#[derive(Clone, Debug, PartialEq)]
enum Factors {
    Whole(f64),
    /// Numbers of rows that follow each other, each with its factor.
    Rows(Vec<(i64, f64)>),
}

impl Fold {
    /// Multiplies all tensors whose names end so.
    pub(crate) fn whole(&mut self, ends_with: &'static str, factor: f64) {
        if factor != 1. {
            self.factors.push((ends_with, Factors::Whole(factor)));
        }
    }

    /// Multiplies rows of all tensors whose names end so.
    pub(crate) fn rows(&mut self, ends_with: &'static str, rows: Vec<(i64, f64)>) {
        if rows.iter().any(|&(_, factor)| factor != 1.) {
            self.factors.push((ends_with, Factors::Rows(rows)));
        }
    }

    /// Whether every tensor stays as it is.
    pub fn is_empty(&self) -> bool {
        self.factors.is_empty()
    }

    /// `tensor`, or its gradient, which is called `theirs` there, times its factors: the product in f64, or the tensor itself.
    ///
    /// The gradient of their tensor is that of ours times the same factors.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] if libtorch refuses.
    pub fn apply(&self, theirs: &str, tensor: &Tensor) -> Result<Tensor> {
        match self.of(theirs) {
            None => Ok(tensor.shallow_clone()),
            Some(Factors::Whole(factor)) => Ok(tensor.f_to_kind(Kind::Double)?.f_mul_scalar(*factor)?),
            Some(Factors::Rows(rows)) => {
                let factors: Vec<f64> =
                    rows.iter().flat_map(|&(n, factor)| std::iter::repeat_n(factor, n as usize)).collect();
                let mut shape = vec![1; tensor.dim()];
                shape[0] = factors.len() as i64;
                let factors = Tensor::f_from_slice(&factors)?.f_to_device(tensor.device())?.f_reshape(shape)?;
                Ok(tensor.f_to_kind(Kind::Double)?.f_mul(&factors)?)
            }
        }
    }

    /// The one factor of all of the tensor that is called `theirs` there.
    pub(crate) fn factor(&self, theirs: &str) -> f64 {
        if let Some(Factors::Whole(factor)) = self.of(theirs) { *factor } else { 1. }
    }

    fn of(&self, theirs: &str) -> Option<&Factors> {
        self.factors.iter().find(|(end, _)| theirs.ends_with(end)).map(|(_, factors)| factors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_exact_products_and_ones_change_nothing() {
        let mut fold = Fold::default();
        fold.whole("a.weight", 1.);
        fold.rows("b.weight", vec![(1, 1.), (2, 1.)]);
        assert!(fold.is_empty());
        fold.whole("a.weight", 0.1);
        fold.rows("b.weight", vec![(1, 3.), (2, 0.25)]);
        let x = Tensor::from_slice(&[1f32, 3., 7.]);
        assert_eq!(fold.apply("layers.0.a.weight", &x).unwrap(), x.to_kind(Kind::Double) * 0.1);
        assert_eq!(fold.apply("layers.0.a.bias", &x).unwrap(), x);
        let want = Tensor::from_slice(&[3f64, 0.75, 1.75]);
        assert_eq!(fold.apply("layers.0.b.weight", &x).unwrap(), want);
        assert_eq!(fold.apply("b.weight", &x.view([3, 1])).unwrap(), want.view([3, 1]));
        assert_eq!((fold.factor("a.weight"), fold.factor("c.weight")), (0.1, 1.));
    }
}
