//! Where the product that is the gradient of a weight goes.

use std::cell::Cell;

use tch::{Kind, Tensor};

use flowhn_torch::{Result, Sum, product, product_into};

use crate::{Params, Weight};

/// Whether products are added to the gradient that is there.
#[derive(Debug, Default)]
pub(crate) struct InPlace(Cell<bool>);

/// The type of the gradient of a weight, and the gradient of the backward passes before, if this one adds to it.
#[derive(Debug)]
pub(crate) struct GradPlace {
    kind: Kind,
    before: Option<Tensor>,
}

impl GradPlace {
    /// The gradient `a b`; `None` where it was added to the one before.
    pub(crate) fn product(&self, a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
        match &self.before {
            Some(before) => product_into(a, b, before, Sum::Old).map(|()| None),
            None => product(a, b, self.kind).map(Some),
        }
    }
}

impl Weight {
    /// The place for the gradient of a product that is made now.
    pub(crate) fn grad_place(&self) -> GradPlace {
        let leaf = self.grad_leaf();
        let before = self.beside.in_place.0.get().then(|| leaf.grad());
        let before = before.filter(|grad| grad.defined() && grad.kind() == leaf.kind() && grad.is_contiguous());
        GradPlace { kind: leaf.kind(), before }
    }
}

impl Params {
    /// From now on the gradients of projections ([`Linear`](crate::Linear)) that a second backward pass and later ones compute are added to those
    /// of the passes before by the matrix products themselves, where bf16 activations meet a weight's bf16 copy: one read and one write of
    /// a sum that autograd would write, read, and add in a pass of its own. So what a backward pass has begun to add cannot be taken back,
    /// and `Tensor::run_backward` for the gradient of such a weight finds none while [`Weight::grad`] has one.
    pub fn add_grads_in_place(&self) {
        self.iter().for_each(|param| param.weight.beside.in_place.0.set(true));
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

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
        weight.clear_grad().unwrap();
        assert!(product().is_some_and(|grad| grad.equal(&want)), "none before");
    }
}
