//! Errors and panics on either side of the border come back as errors, and the process goes on.

mod common;

use common::{Square, custom, leaf, values};
use flowhn_torch::{BackwardCtx, Error, Result, apply};
use tch::{Kind, Tensor};

fn grad_mode_is_on() -> bool {
    (leaf(&[1.]) * 2.).requires_grad()
}

/// The error of a backward, after making sure that the next backward works.
fn backward_error<B>(backward: B) -> String
where
    B: Fn(&BackwardCtx, &[Tensor]) -> Result<Vec<Option<Tensor>>> + Send + 'static,
{
    let x = leaf(&[1., 2., 3.]);
    let y = apply(custom(|_, x| Ok(vec![x[0] * 2.]), backward), &[&x]).unwrap().remove(0);
    let error = y.sum(Kind::Double).f_backward().unwrap_err().to_string();
    assert!(!x.grad().defined(), "a failed backward left a gradient");
    assert!(grad_mode_is_on());
    apply(Square, &[&x]).unwrap()[0].sum(Kind::Double).f_backward().unwrap();
    assert_eq!(values(&x.grad()), [2., 4., 6.]);
    error
}

#[test]
fn an_error_in_forward_is_returned_unchanged() {
    let x = leaf(&[1.]);
    let fail = custom(|_, _| Err(Error::invalid("inner", "not today")), |_, _| Ok(vec![None]));
    assert_eq!(apply(fail, &[&x]).unwrap_err().to_string(), "inner: not today");
}

#[test]
fn a_panic_in_forward_is_an_error_and_leaves_recording_on() {
    let x = leaf(&[1., 2.]);
    let plain = custom(|_, _| panic!("lost at {}", 7), |_, _| Ok(vec![None]));
    assert!(matches!(apply(plain, &[&x]), Err(Error::Panic(text)) if text == "lost at 7"));
    assert!(grad_mode_is_on(), "the panic left gradient recording off");
    let tch = custom(|_, x| Ok(vec![x[0] + Tensor::from_slice(&[1., 2., 3.])]), |_, _| Ok(vec![None]));
    match apply(tch, &[&x]) {
        Err(Error::Torch(text)) => assert!(text.ends_with("at non-singleton dimension 0"), "{text}"),
        other => panic!("{other:?}"),
    }
    assert!(grad_mode_is_on());
}

#[test]
fn an_error_in_backward_names_the_function() {
    let error = backward_error(|_, _| Err(Error::invalid("inner", "not today")));
    assert!(error.contains("custom backward: inner: not today"), "{error}");
}

#[test]
fn a_panic_in_backward_is_an_error() {
    let error = backward_error(|_, _| panic!("lost\0again"));
    assert!(error.contains("custom backward: panic: lost again"), "{error}");
    let error = backward_error(|_, g| Ok(vec![Some(&g[0] + Tensor::from_slice(&[1., 2.]))]));
    assert!(error.contains("custom backward: libtorch: The size of tensor a (3)"), "{error}");
    let error = backward_error(|_, _| std::panic::panic_any(17u8));
    assert!(error.contains("custom backward: panic: a panic without a message"), "{error}");
    let error = backward_error(|ctx, _| Ok(vec![ctx.saved().first().map(Tensor::shallow_clone), None, None]));
    assert!(error.contains("backward returned 3 gradients for 1 inputs"), "{error}");
    let error = backward_error(|ctx, _| Ok(vec![ctx.needs_grad(4).then(Tensor::new)]));
    assert!(error.contains("index out of bounds"), "{error}");
}

#[test]
fn a_wrong_number_of_gradients_is_an_error() {
    let error = backward_error(|_, _| Ok(vec![]));
    assert!(error.contains("backward returned 0 gradients for 1 inputs"), "{error}");
    let error = backward_error(|_, g| Ok(vec![Some(g[0].copy()), Some(g[0].copy())]));
    assert!(error.contains("backward returned 2 gradients for 1 inputs"), "{error}");
}

#[test]
fn a_wrong_shape_of_gradient_is_an_error() {
    let error = backward_error(|_, g| Ok(vec![Some(g[0].narrow(0, 0, 2))]));
    assert!(error.contains("custom returned an invalid gradient at index 0 - got [2]"), "{error}");
}

#[test]
fn a_gradient_of_another_type_is_converted() {
    let x = leaf(&[1., 2.]);
    let half = custom(|_, x| Ok(vec![x[0] * 2.]), |_, g| Ok(vec![Some((&g[0] * 2.).to_kind(Kind::Float))]));
    apply(half, &[&x]).unwrap()[0].sum(Kind::Double).f_backward().unwrap();
    assert_eq!((x.grad().kind(), values(&x.grad())), (Kind::Double, vec![2., 2.]));
}

#[test]
fn a_function_that_panics_while_it_is_dropped_does_not_take_the_process_along() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }
    let x = leaf(&[1.]);
    let bomb = Bomb;
    let function = custom(
        |_, x| Ok(vec![x[0] * 2.]),
        move |_, g| {
            let _kept = &bomb;
            Ok(vec![Some(&g[0] * 2.)])
        },
    );
    apply(function, &[&x]).unwrap()[0].f_backward().unwrap();
    assert_eq!(values(&x.grad()), [2.]);
}
