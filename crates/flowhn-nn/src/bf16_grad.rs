//! Gradients of projections in bf16: two bytes an element where f32 takes four, to write once and to read twice in an update.

use std::cell::OnceCell;

use tch::{Kind, Tensor};

use flowhn_torch::{Error, Result, clear_grad};

use crate::{Params, Weight};

/// What takes the gradient of one weight in the master's place.
///
/// libtorch gives a gradient the type of its leaf. So the leaf is one of bf16 in the shape of the master, which has a single element in
/// memory: nobody reads its values.
#[derive(Debug, Default)]
pub(crate) struct Bf16Grad(OnceCell<Tensor>);

impl Weight {
    /// The leaf of autograd that takes the gradient of a product with the weight, in the shape of the master. Where gradients are bf16, its
    /// values mean nothing.
    pub fn grad_leaf(&self) -> &Tensor {
        self.beside.bf16_grad.0.get().unwrap_or(self.master())
    }

    /// From now on its gradient is bf16; functions that compute with the weight hand it to [`Weight::grad_leaf`].
    ///
    /// # Errors
    /// [`Error::Torch`] if there is no memory.
    pub fn use_bf16_grad(&self) -> Result<()> {
        if self.beside.bf16_grad.0.get().is_none() {
            let one = Tensor::f_zeros([1], (Kind::BFloat16, self.master().device()))?;
            let leaf = one.f_expand(self.size().as_slice(), false)?;
            let leaf = leaf.f_set_requires_grad(self.master().requires_grad())?;
            self.beside.bf16_grad.0.get_or_init(|| leaf);
        }
        Ok(())
    }

    /// The type of its gradient: that of the master, or bf16.
    pub fn grad_kind(&self) -> Kind {
        self.grad_leaf().kind()
    }

    /// The gradient as the backward passes have left it since it was last forgotten; `None` if none has reached the weight.
    ///
    /// # Errors
    /// [`Error::Invalid`] where gradients are bf16 and one reached the master, from activations of another type or by [`Weight::to`].
    pub fn grad(&self) -> Result<Option<Tensor>> {
        let of = |leaf: &Tensor| Some(leaf.grad()).filter(Tensor::defined);
        let grad = of(self.grad_leaf());
        if self.beside.bf16_grad.0.get().is_some() && of(self.master()).is_some() {
            let message = "a gradient has reached the f32 weight where bf16 was asked for: its products have to be those of Linear \
                           (or hand it to Weight::grad_leaf), and their activations bf16";
            return Err(Error::invalid("grad", message));
        }
        Ok(grad)
    }

    /// Forgets the gradient, so that the next backward pass hands over its own instead of adding.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch refuses.
    pub fn clear_grad(&self) -> Result<()> {
        self.beside.bf16_grad.0.get().map(clear_grad).transpose()?;
        clear_grad(self.master())
    }
}

impl Params {
    /// From now on gradients of projections ([`Linear`](crate::Linear)) whose weights have names that are meant leave their products in
    /// bf16, and stay so until the update. Sums over tokens are f32, but where cuBLAS splits one it may add the parts in bf16, as in all
    /// products whose results are bf16. Their activations have to be bf16, and every gradient has to come through
    /// [`linear`](crate::linear) or [`linear_cross_entropy`](crate::linear_cross_entropy): one by [`Weight::to`] goes to the master and
    /// is refused by [`Weight::grad`].
    ///
    /// Gradients that are added up over several backward passes are rounded each time; f32 gradients are not.
    ///
    /// # Errors
    /// [`Error::Torch`] if there is no memory.
    pub fn use_bf16_grads(&self, is_meant: impl Fn(&str) -> bool) -> Result<()> {
        let mut meant = self.iter().filter(|param| param.weight.is_projection() && is_meant(&param.name));
        meant.try_for_each(|param| param.weight.use_bf16_grad())
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{Bias, Init, Linear};

    fn projection() -> (Params, Linear) {
        tch::manual_seed(0);
        let mut params = Params::new(Device::Cpu, 0);
        let init = Init::Normal { std: 1. };
        let linear = Linear::new(&mut params.root(), "proj", 6, 4, init, Bias::Init(Init::Normal { std: 1. })).unwrap();
        (params, linear)
    }

    fn noise(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16)
    }

    #[test]
    fn the_gradient_is_the_product_rounded_once() {
        let ((params, linear), x, dy) = (projection(), noise(&[3, 5, 6]).set_requires_grad(true), noise(&[3, 5, 4]));
        let backward = || {
            params.zero_grad().unwrap();
            let y = linear.forward(&x).unwrap();
            (&y * &dy).sum(Kind::Float).backward();
            y.detach()
        };
        let y = backward();
        params.use_bf16_grads(|name| name == "proj.weight").unwrap();
        // On the CPU a bias is now added behind a rounding.
        let difference = (backward() - &y).abs().max() / y.abs().max();
        assert!(difference.double_value(&[]) <= 2f64.powi(-7), "the forward pass is the same");
        let grad = linear.weight().grad().unwrap().unwrap();
        let want = dy.view([15, 4]).tr().to_kind(Kind::Double).mm(&x.detach().view([15, 6]).to_kind(Kind::Double));
        assert_eq!((grad.kind(), grad.size()), (Kind::BFloat16, vec![4, 6]));
        let error = ((grad.to_kind(Kind::Double) - &want).abs() / want.abs().max()).max().double_value(&[]);
        assert!(error < 2f64.powi(-8), "{error}");
        assert!(linear.bias().unwrap().grad().unwrap().is_some_and(|grad| grad.kind() == Kind::Float));
        assert!(x.grad().defined());
        params.zero_grad().unwrap();
        assert!(linear.weight().grad().unwrap().is_none());
    }

    #[test]
    fn a_gradient_of_another_type_is_refused() {
        let (params, linear) = projection();
        params.use_bf16_grads(|_| true).unwrap();
        let x = noise(&[2, 6]).to_kind(Kind::Float);
        linear.forward(&x).unwrap().sum(Kind::Float).backward();
        let refused = linear.weight().grad().unwrap_err().to_string();
        assert!(refused.contains("bf16"), "{refused}");
    }
}
