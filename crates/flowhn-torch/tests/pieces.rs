//! Pieces of a tensor: their gradients meet in one, wherever they were written.

mod common;

use common::{leaf, values};
use flowhn_torch::testing::gradcheck;
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, apply, split_features};
use tch::{Device, Kind, Tensor};

/// Squares its input; the gradient is written where the input's maker wants it.
struct PlacedSquare;

impl Function for PlacedSquare {
    const NAME: &'static str = "placed_square";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        ctx.save(inputs[0]);
        Ok(vec![inputs[0] * inputs[0]])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let mut dx = ctx.grad_place(0, &ctx.saved()[0])?;
        dx.copy_(&(&ctx.saved()[0] * &grads[0] * 2.));
        Ok(vec![Some(dx)])
    }
}

fn square(x: &Tensor) -> Result<Tensor> {
    Ok(apply(PlacedSquare, &[x])?.remove(0))
}

#[test]
fn gradients_agree_with_difference_quotients_however_the_pieces_are_used() -> Result<()> {
    tch::manual_seed(1);
    let x = Tensor::randn([3, 2, 9], (Kind::Double, Device::Cpu)).set_requires_grad(true);
    type Use = fn(&[Tensor]) -> Result<Tensor>;
    let uses: [(&str, Use); 7] = [
        ("all placed", |p| {
            Ok(square(&p[0])?.sum(Kind::Double)
                + square(&p[1])?.sin().sum(Kind::Double)
                + square(&p[2])?.sum(Kind::Double))
        }),
        ("none placed", |p| Ok(p[0].sin().sum(Kind::Double) + p[1].exp().sum(Kind::Double) + p[2].sum(Kind::Double))),
        ("some placed", |p| {
            Ok(square(&p[0])?.sum(Kind::Double) + p[1].exp().sum(Kind::Double) + p[2].sum(Kind::Double))
        }),
        ("one unused", |p| Ok(square(&p[1])?.exp().sum(Kind::Double) + p[2].sum(Kind::Double))),
        ("one used twice", |p| {
            let twice = square(&p[0])? * 3. + square(&p[0])?.sin() + p[0].exp();
            Ok(twice.sum(Kind::Double) + square(&p[2])?.sum(Kind::Double))
        }),
        // Nothing else reaches the piece: the first gradient waits where the second must not be written.
        ("one placed twice", |p| {
            Ok((square(&p[0])? * 3. + square(&p[0])?.sin()).sum(Kind::Double) + square(&p[2])?.sum(Kind::Double))
        }),
        ("a view between", |p| Ok(square(&p[1].flatten(-2, -1))?.sum(Kind::Double) + square(&p[2])?.sum(Kind::Double))),
    ];
    for (name, then) in uses {
        let through = |inputs: &[Tensor]| then(&split_features(&(&inputs[0] * 1.), &[&[4], &[2, 2], &[1]])?);
        gradcheck(through, &[x.shallow_clone()], 1e-6, 1e-7)
            .map_err(|error| Error::invalid("pieces", format!("{name}: {error}")))?;
    }
    Ok(())
}

#[test]
fn a_placed_gradient_is_not_copied_and_a_second_backward_starts_anew() -> Result<()> {
    let x = leaf(&[1., 2., 3.]);
    let pieces = split_features(&x, &[&[1], &[2]])?;
    let loss = square(&pieces[0])?.sum(Kind::Double) + square(&pieces[1])?.sum(Kind::Double);
    let once = Tensor::run_backward(&[&loss], &[&x], true, false);
    let again = Tensor::run_backward(&[&loss], &[&x], true, false);
    assert_eq!(values(&once[0]), [2., 4., 6.]);
    assert_eq!(values(&again[0]), [2., 4., 6.]);
    assert_ne!(once[0].data_ptr(), again[0].data_ptr(), "the first gradient has been handed out");
    Ok(())
}

#[test]
fn pieces_are_views_and_must_add_up() -> Result<()> {
    let x = Tensor::zeros([2, 5], (Kind::Float, Device::Cpu));
    let pieces = split_features(&x, &[&[3], &[2]])?;
    assert_eq!(pieces[1].data_ptr() as usize, x.data_ptr() as usize + 3 * size_of::<f32>());
    let error = split_features(&x, &[&[3], &[3]]).unwrap_err().to_string();
    assert!(error.contains("split_features: x has shape [2, 5], expected [.., 6]"), "{error}");
    Ok(())
}
