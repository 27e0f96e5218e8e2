//! Where the product that is the gradient of a weight goes.

use std::cell::Cell;

use tch::Tensor;

use flowhn_torch::{Result, Sum, product, product_into};

use crate::{Params, Weight};

/// Whether products are added to the gradient that is there.
#[derive(Debug, Default)]
pub(crate) struct InPlace(Cell<bool>);

/// Where the gradient of one product with a weight goes.
#[derive(Debug)]
pub(crate) struct GradPlace {
    leaf: Tensor,
    in_place: bool,
}

impl GradPlace {
    /// The gradient `a b`; `None` where it was added to that of the backward passes before.
    pub(crate) fn product(&self, a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
        let kind = self.leaf.kind();
        let before = self.in_place.then(|| self.leaf.grad());
        match before.filter(|grad| grad.defined() && grad.kind() == kind && grad.is_contiguous()) {
            Some(before) => product_into(a, b, &before, Sum::Old).map(|()| None),
            None => product(a, b, kind).map(Some),
        }
    }
}

impl Weight {
    pub(crate) fn grad_place(&self) -> GradPlace {
        GradPlace { leaf: self.grad_leaf().shallow_clone(), in_place: self.beside.in_place.0.get() }
    }
}

impl Params {
    /// From now on the gradients of projections ([`Linear`](crate::Linear)) that a second backward pass and later ones compute are added to those
    /// of the passes before by the matrix products themselves, where bf16 activations meet a weight's bf16 copy: one read and one write of
    /// a sum where autograd writes the gradient, reads it and the sum, and writes that. While [`Weight::grad`] has a gradient, then,
    /// `Tensor::run_backward` finds none for such a weight, and there are no second derivatives of it.
    pub fn add_grads_in_place(&self) {
        self.iter().for_each(|param| param.weight.beside.in_place.0.set(true));
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::{Decay, Init};

    #[test]
    fn a_product_is_added_to_the_gradient_before_where_that_is_asked_for() {
        let mut params = Params::new(Device::Cpu, 0);
        let weight = params.root().weight("w", &[2, 3], Init::Normal { std: 1. }, Decay::Yes).unwrap();
        let [a, b] = [[2, 5], [5, 3]].map(|shape| Tensor::randn(shape, (Kind::Float, Device::Cpu)));
        let want = a.mm(&b);
        let product = || weight.grad_place().product(&a, &b).unwrap();
        let backward = || (weight.master() * &want).sum(Kind::Float).backward();
        assert!(product().is_some_and(|grad| grad.equal(&want)), "not asked for, none before");
        backward();
        assert!(product().is_some_and(|grad| grad.equal(&want)), "not asked for");
        params.add_grads_in_place();
        assert!(product().is_none());
        assert!(weight.grad().unwrap().unwrap().allclose(&(&want * 2.), 1e-6, 1e-6, false));
        // A place that was made while there was a gradient.
        let place = weight.grad_place();
        weight.clear_grad().unwrap();
        assert!(place.product(&a, &b).unwrap().is_some_and(|grad| grad.equal(&want)), "none any more");
    }
}
