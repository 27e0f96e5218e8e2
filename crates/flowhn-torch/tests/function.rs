//! Custom functions: gradients, what is saved, which outputs and inputs take part.

mod common;

use std::sync::{Arc, Mutex};

use common::{Square, custom, leaf, values};
use flowhn_torch::testing::gradcheck;
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, apply, cpu};
use tch::{Kind, Tensor};

/// RMSNorm over the last axis: saves inputs and an intermediate, has two inputs and a second output without gradient.
struct RmsNorm {
    eps: f64,
}

impl Function for RmsNorm {
    const NAME: &'static str = "rms_norm";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let [x, w] = inputs else { return Err(Error::invalid(Self::NAME, "takes x and w")) };
        let mean = (*x * *x).mean_dim([-1i64].as_slice(), true, x.kind());
        let inv_rms = (mean + self.eps).rsqrt();
        for tensor in [*x, *w, &inv_rms] {
            ctx.save(tensor);
        }
        ctx.mark_non_differentiable(1);
        Ok(vec![*x * &inv_rms * *w, inv_rms])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [x, w, inv_rms] = ctx.saved() else { return Err(Error::invalid(Self::NAME, "three tensors were saved")) };
        let x_hat = x * inv_rms;
        let g = &grads[0] * w;
        let dx = ctx.needs_grad(0).then(|| {
            let mean = (&g * &x_hat).mean_dim([-1i64].as_slice(), true, g.kind());
            inv_rms * (&g - &x_hat * mean)
        });
        let dw = ctx.needs_grad(1).then(|| (&grads[0] * &x_hat).sum_dim_intlist([0i64].as_slice(), false, g.kind()));
        Ok(vec![dx, dw])
    }
}

#[test]
fn gradients_agree_with_difference_quotients() -> Result<()> {
    tch::manual_seed(1);
    let options = (Kind::Double, tch::Device::Cpu);
    let x = Tensor::randn([5, 7], options).set_requires_grad(true);
    let w = Tensor::randn([7], options).set_requires_grad(true);
    let norm = |inputs: &[Tensor]| Ok(apply(RmsNorm { eps: 1e-6 }, &[&inputs[0], &inputs[1]])?.remove(0));
    gradcheck(norm, &[x.shallow_clone(), w.shallow_clone()], 1e-6, 1e-7)?;
    // In a larger graph, between operators of libtorch, used twice, with strided input.
    gradcheck(
        |inputs| {
            let once = norm(&[inputs[0].tanh(), inputs[1].shallow_clone()])?;
            Ok(norm(&[once + &inputs[0], inputs[1].exp()])?.sin())
        },
        &[x.transpose(0, 1).detach().transpose(0, 1).set_requires_grad(true), w.detach()],
        1e-6,
        1e-7,
    )
}

#[test]
fn gradcheck_finds_a_wrong_gradient_and_refuses_what_it_cannot_check() {
    let wrong = |inputs: &[Tensor]| {
        let off = custom(|_, x| Ok(vec![x[0] * 2.]), |_, g| Ok(vec![Some(&g[0] * 2.001)]));
        Ok(apply(off, &[&inputs[0]])?.remove(0))
    };
    let error = gradcheck(wrong, &[leaf(&[1., 2.])], 1e-6, 1e-6).unwrap_err().to_string();
    assert!(error.contains("input 0, element"), "{error}");
    let float = Tensor::from_slice(&[1f32]).set_requires_grad(true);
    assert!(matches!(gradcheck(wrong, &[float], 1e-6, 1e-6), Err(Error::Dtype { .. })));
    let square = |inputs: &[Tensor]| Ok(apply(Square, &[&inputs[0]])?.remove(0));
    assert!(matches!(gradcheck(square, &[Tensor::from_slice(&[1f64])], 1e-6, 1e-6), Err(Error::Torch(_))));
    // An input that `f` ignores has gradient zero.
    gradcheck(square, &[leaf(&[1., 2.]), leaf(&[3.])], 1e-6, 1e-6).unwrap();
}

#[test]
fn inputs_outputs_and_intermediates_are_saved_as_they_were() -> Result<()> {
    let x = leaf(&[2., 3.]);
    let function = custom(
        |ctx, x| {
            let cube = x[0] * x[0] * x[0];
            let out = &cube + 1.;
            for tensor in [x[0], &out, &cube, &out.view([2, 1]), &x[0].narrow(0, 1, 1), &Tensor::new()] {
                ctx.save(tensor);
            }
            Ok(vec![out])
        },
        |ctx, g| {
            let saved: Vec<Vec<f64>> = ctx.saved()[..5].iter().map(values).collect();
            assert_eq!(saved, [vec![2., 3.], vec![9., 28.], vec![8., 27.], vec![9., 28.], vec![3.]]);
            assert_eq!(ctx.saved()[3].size(), [2, 1]);
            assert!(!ctx.saved()[5].defined());
            assert!(ctx.saved()[..5].iter().all(|tensor| !tensor.requires_grad()));
            Ok(vec![Some(&ctx.saved()[0] * &ctx.saved()[0] * &g[0] * 3.)])
        },
    );
    let y = apply(function, &[&x])?.remove(0);
    y.sum(Kind::Double).f_backward()?;
    assert_eq!(values(&x.grad()), [12., 27.]);
    Ok(())
}

#[test]
fn an_in_place_edit_of_anything_saved_is_noticed() -> Result<()> {
    for edited in 0..3 {
        let x = leaf(&[2., 3.]);
        let input = &x * 1.;
        let kept = Arc::new(Mutex::new(Tensor::new()));
        let intermediate = Arc::clone(&kept);
        let function = custom(
            move |ctx, x| {
                let half = x[0] * 0.5;
                let out = &half * 2.;
                for tensor in [x[0], &half, &out] {
                    ctx.save(tensor);
                }
                *intermediate.lock().unwrap() = half;
                Ok(vec![out])
            },
            |_, g| Ok(vec![Some(g[0].shallow_clone())]),
        );
        let y = apply(function, &[&input])?.remove(0);
        let loss = y.sum(Kind::Double);
        let mut target = match edited {
            0 => input.detach(),
            1 => kept.lock().unwrap().shallow_clone(),
            _ => y.detach(),
        };
        let _ = target.g_add_scalar_(1.);
        let error = loss.f_backward().unwrap_err().to_string();
        assert!(error.contains("modified by an inplace operation"), "{edited}: {error}");
    }
    Ok(())
}

#[test]
fn forward_may_not_change_an_input_that_requires_a_gradient() -> Result<()> {
    let write = || {
        custom(
            |_, x| {
                let _ = x[0].shallow_clone().g_mul_scalar_(2.);
                Ok(vec![x[0] * x[1]])
            },
            |_, g| Ok(vec![None, Some(g[0].shallow_clone())]),
        )
    };
    let (x, w) = (leaf(&[1.]), leaf(&[1.]));
    let error = apply(write(), &[&(&x * 1.), &w]).unwrap_err().to_string();
    assert_eq!(error, "custom: forward changed input 0 in place, which its gradient would not know");
    // A buffer without gradient, such as a cache, is the caller's own affair.
    apply(write(), &[&x.detach(), &w])?;
    Ok(())
}

#[test]
fn a_forward_may_overwrite_an_input_that_it_announces() -> Result<()> {
    // Doubles the first input where it lies and hands it out.
    let double = || {
        let forward = |ctx: &mut ForwardCtx, x: &[&Tensor]| {
            ctx.overwrite("double", "state", x, 0)?;
            let mut state = x[0].shallow_clone();
            cpu::update(&mut state, |x: &mut [f64]| {
                x.iter_mut().for_each(|x| *x *= 2.);
                Ok(())
            })?;
            Ok(vec![state])
        };
        custom(forward, |_, _| Ok(vec![None]))
    };
    let pool = Tensor::from_slice(&[1f64, 2., 3., 4.]);
    let state = pool.narrow(0, 1, 2);
    // A forward before kept the state's values for its gradient.
    let x = leaf(&[5., 5.]);
    let loss = (&x * &state).sum(Kind::Double);
    let out = apply(double(), &[&state, &pool.narrow(0, 0, 1), &pool.narrow(0, 3, 1)])?.remove(0);
    assert_eq!((values(&pool), out.data_ptr()), (vec![1., 4., 6., 4.], state.data_ptr()));
    assert!(loss.f_backward().unwrap_err().to_string().contains("modified by an inplace operation"));

    let error = |inputs: &[&Tensor]| apply(double(), inputs).unwrap_err().to_string();
    for other in [&pool.narrow(0, 2, 2), &state] {
        let shared = "double: state is written in place, but shares memory with another argument: copy one of them";
        assert_eq!(error(&[&state, other]), shared);
    }
    let strided = error(&[&pool.slice(0, 0, 4, 2)]);
    assert!(strided.starts_with("double: state has strides [2], but is written in place"), "{strided}");
    let recorded = error(&[&state, &x]);
    assert!(recorded.starts_with("double: state is written in place, which has no gradient"), "{recorded}");
    assert_eq!(values(&pool), [1., 4., 6., 4.]);
    tch::no_grad(|| apply(double(), &[&state, &x]))?;
    assert_eq!(values(&pool), [1., 8., 12., 4.]);
    Ok(())
}

#[test]
fn outputs_without_gradient_stay_out_of_the_graph() -> Result<()> {
    let x = leaf(&[3., -4.]);
    let function = custom(
        |ctx, x| {
            ctx.mark_non_differentiable(1);
            // The third output has integers, which never have a gradient.
            Ok(vec![x[0].abs(), x[0].sign(), x[0].argmax(0, false)])
        },
        |_, g| {
            assert_eq!((g.len(), g[1].size(), values(&g[1])), (3, vec![2], vec![0., 0.]));
            assert_eq!((g[2].kind(), g[2].int64_value(&[])), (Kind::Int64, 0));
            Ok(vec![Some(g[0].shallow_clone())])
        },
    );
    let outputs = apply(function, &[&x])?;
    let flags: Vec<bool> = outputs.iter().map(Tensor::requires_grad).collect();
    assert_eq!(flags, [true, false, false]);
    (&outputs[0] * &outputs[1]).sum(Kind::Double).f_backward()?;
    assert_eq!(values(&x.grad()), [1., -1.]);

    let all = custom(
        |ctx, x| {
            ctx.mark_non_differentiable(0);
            Ok(vec![x[0] * 2.])
        },
        |_, _| unreachable!("there is nothing to differentiate"),
    );
    assert!(!apply(all, &[&x])?[0].requires_grad());
    Ok(())
}

#[test]
fn marking_an_output_that_is_not_there_is_an_error_with_and_without_a_graph() {
    for x in [leaf(&[1.]), Tensor::from_slice(&[1.])] {
        let function = custom(
            |ctx, x| {
                ctx.mark_non_differentiable(1);
                Ok(vec![x[0] * 2.])
            },
            |_, _| Ok(vec![None]),
        );
        let error = apply(function, &[&x]).unwrap_err().to_string();
        assert_eq!(error, "custom: output 1 was marked, but there are 1 outputs");
    }
}

#[test]
fn needs_grad_tells_both_passes_what_is_wanted() -> Result<()> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let run = |x: &Tensor, y: &Tensor| {
        let (forward, backward) = (Arc::clone(&seen), Arc::clone(&seen));
        let function = custom(
            move |ctx, x| {
                forward.lock().unwrap().push((ctx.is_recorded(), ctx.needs_grad(0), ctx.needs_grad(1)));
                Ok(vec![x[0] + x[1]])
            },
            move |ctx, g| {
                backward.lock().unwrap().push((true, ctx.needs_grad(0), ctx.needs_grad(1)));
                // Both, wanted or not: the one that is not wanted is dropped.
                Ok(vec![Some(g[0].shallow_clone()), Some(g[0].shallow_clone())])
            },
        );
        Ok::<_, Error>(apply(function, &[x, y])?.remove(0).sum(Kind::Double))
    };
    let (x, y, c) = (leaf(&[1.]), leaf(&[1.]), Tensor::from_slice(&[1.]));
    run(&x, &c)?.f_backward()?;
    // Only `y` is asked for here, though both require a gradient.
    Tensor::f_run_backward(&[run(&x, &y)?], &[&y], false, false)?;
    assert!(!run(&c, &c)?.requires_grad());
    assert!(!tch::no_grad(|| run(&x, &y))?.requires_grad());
    let (t, f) = (true, false);
    assert_eq!(*seen.lock().unwrap(), [(t, t, f), (t, t, f), (t, t, t), (t, f, t), (f, f, f), (f, f, f)]);
    assert_eq!(values(&x.grad()), [1.]);
    assert!(!c.grad().defined());
    Ok(())
}

#[test]
fn gradients_of_unused_outputs_are_zeros() -> Result<()> {
    let x = leaf(&[2., 5.]);
    let function = custom(
        |_, x| Ok(vec![x[0] * 2., (x[0] * 3.).to_kind(Kind::Float), x[0].sum(Kind::Double)]),
        |_, g| {
            assert_eq!((g[0].kind(), values(&g[0])), (Kind::Double, vec![0., 0.]));
            assert_eq!((g[1].kind(), values(&g[1])), (Kind::Float, vec![1., 1.]));
            assert_eq!((g[2].size(), values(&g[2])), (vec![], vec![0.]));
            Ok(vec![Some(&g[0] * 2. + g[1].to_kind(Kind::Double) * 3. + &g[2])])
        },
    );
    let outputs = apply(function, &[&x])?;
    outputs[1].sum(Kind::Float).f_backward()?;
    assert_eq!(values(&x.grad()), [3., 3.]);
    Ok(())
}

#[test]
fn a_gradient_may_stay_undefined_where_the_forward_says_so() -> Result<()> {
    let x = leaf(&[2., 5.]);
    let grads = |used: usize| -> Result<Vec<f64>> {
        x.shallow_clone().zero_grad();
        let function = custom(
            |ctx, x| {
                ctx.accept_undefined_grad(1);
                Ok(vec![x[0] * 2., x[0] * 3.])
            },
            move |_, g| {
                assert_eq!((g[0].defined(), g[1].defined()), (true, used == 1));
                let second = if g[1].defined() { &g[1] * 3. } else { Tensor::zeros_like(&g[0]) };
                Ok(vec![Some(&g[0] * 2. + second)])
            },
        );
        apply(function, &[&x])?[used].sum(Kind::Double).f_backward()?;
        Ok(values(&x.grad()))
    };
    assert_eq!((grads(0)?, grads(1)?), (vec![2., 2.], vec![3., 3.]));

    let absent = custom(|ctx, x| (ctx.accept_undefined_grad(1), Ok(vec![x[0] * 2.])).1, |_, _| Ok(vec![None]));
    let refused = apply(absent, &[&x]).unwrap_err().to_string();
    assert!(refused.contains("output 1 was marked, but there are 1 outputs"), "{refused}");
    Ok(())
}

#[test]
fn several_outputs_and_no_gradient_add_up() -> Result<()> {
    let (x, y) = (leaf(&[2., 5.]), leaf(&[1., 1.]));
    let function = custom(|_, x| Ok(vec![x[0] * 2., x[0] * 3.]), |_, g| Ok(vec![Some(&g[0] * 2. + &g[1] * 3.), None]));
    let outputs = apply(function, &[&x, &y])?;
    (&outputs[0] * 10. + &outputs[1]).sum(Kind::Double).f_backward()?;
    assert_eq!(values(&x.grad()), [23., 23.]);
    // `None` adds nothing: no gradient arrives at all.
    assert!(!y.grad().defined());
    Ok(())
}

#[test]
fn outputs_may_be_inputs_views_of_them_and_each_other() -> Result<()> {
    let x = leaf(&[2., 5.]);
    let function = custom(
        |ctx, x| {
            let twice = x[0] * 2.;
            ctx.save(x[0]);
            Ok(vec![x[0].shallow_clone(), x[0].view([2, 1]), twice.shallow_clone(), twice])
        },
        |ctx, g| {
            assert_eq!(values(&ctx.saved()[0]), [2., 5.]);
            Ok(vec![Some(&g[0] + g[1].view([2]) + (&g[2] + &g[3]) * 2.)])
        },
    );
    let outputs = apply(function, &[&x])?;
    let sums: Vec<Tensor> = outputs.iter().map(|output| output.sum(Kind::Double)).collect();
    (&sums[0] + &sums[1] * 10. + &sums[2] * 100. + &sums[3] * 1000.).f_backward()?;
    assert_eq!(values(&x.grad()), [2211., 2211.]);
    Ok(())
}

#[test]
fn undefined_inputs_pass_and_undefined_outputs_are_refused() -> Result<()> {
    let x = leaf(&[1.]);
    let function = custom(|_, x| Ok(vec![x[0] * 2.]), |_, g| Ok(vec![Some(&g[0] * 2.), None]));
    apply(function, &[&x, &Tensor::new()])?.remove(0).f_backward()?;
    assert_eq!(values(&x.grad()), [2.]);
    for input in [&x, &x.detach()] {
        let function = custom(|_, _| Ok(vec![Tensor::new()]), |_, _| Ok(vec![None]));
        let error = apply(function, &[input]).unwrap_err().to_string();
        assert_eq!(error, "custom: output 0 is an undefined tensor");
    }
    Ok(())
}

#[test]
fn a_graph_may_be_kept_but_not_used_after_its_release() -> Result<()> {
    let x = leaf(&[3.]);
    let y = apply(Square, &[&x])?.remove(0);
    for keep_graph in [true, true, false] {
        let grads = Tensor::f_run_backward(&[&y], &[&x], keep_graph, false)?;
        assert_eq!(values(&grads[0]), [6.]);
    }
    let error = y.f_backward().unwrap_err().to_string();
    assert!(error.contains("backward through the graph a second time"), "{error}");
    Ok(())
}

#[test]
fn a_second_derivative_is_an_error_never_zero() -> Result<()> {
    let x = leaf(&[3.]);
    let refused = |outcome: std::result::Result<Vec<Tensor>, tch::TchError>| {
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains("square: a function written in Rust has no second derivative"), "{error}");
    };
    let first = |x: &Tensor| {
        let y = apply(Square, &[x])?.remove(0);
        let grad = Tensor::f_run_backward(&[&y], &[x], true, true)?.remove(0);
        assert_eq!(values(&grad), [6.]);
        Ok::<_, Error>((y, grad))
    };
    refused(Tensor::f_run_backward(&[first(&x)?.1], &[&x], false, false));
    // Not partly either: the product has a second path to `x` that libtorch could differentiate.
    refused(Tensor::f_run_backward(&[first(&x)?.1 * &x], &[&x], false, false));

    // Nor with respect to what the incoming gradient depended on.
    let w = leaf(&[5.]);
    let y = apply(Square, &[&x])?.remove(0) * &w;
    let grad = Tensor::f_run_backward(&[&y], &[&x], true, true)?.remove(0);
    assert_eq!(values(&grad), [30.]);
    refused(Tensor::f_run_backward(&[&grad], &[&w], true, false));

    // What does not pass through the function can still be differentiated twice.
    let v = leaf(&[2.]);
    let y = apply(Square, &[&x])?.remove(0) + v.pow_tensor_scalar(3);
    let grads = Tensor::f_run_backward(&[&y], &[&x, &v], true, true)?;
    assert_eq!(values(&Tensor::f_run_backward(&[&grads[1]], &[&v], false, false)?[0]), [12.]);
    Ok(())
}
