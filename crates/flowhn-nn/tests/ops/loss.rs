use flowhn_nn::{linear_cross_entropy, reference, token_losses};
use flowhn_torch::testing::{assert_close, gradcheck};
use tch::{Device, Kind, Tensor};

use crate::support::{assert_rule, assert_same_on_any_threads, ids, noise, value_and_grads};

const IGNORED: i64 = -100;

fn kernel(inputs: &[Tensor]) -> flowhn_nn::Result<Tensor> {
    linear_cross_entropy(&inputs[0], &inputs[1], &inputs[2], IGNORED)
}

fn plain(inputs: &[Tensor]) -> Tensor {
    reference::linear_cross_entropy(&inputs[0], &inputs[1], &inputs[2], IGNORED)
}

/// Every third target is ignored; the first is not.
fn targets(n_tokens: i64, vocab_size: i64) -> Tensor {
    let ignored = Tensor::arange(n_tokens, (Kind::Int64, Device::Cpu)).remainder(3).eq(2);
    ids(&[n_tokens], vocab_size, 1).masked_fill(&ignored, IGNORED)
}

#[test]
fn gradients_agree_with_differences() {
    let targets = targets(7, 5);
    let leaves = [noise(&[7, 3], 2).set_requires_grad(true), noise(&[5, 3], 3).set_requires_grad(true)];
    let loss = |x: &[Tensor]| linear_cross_entropy(&x[0], &x[1], &targets, IGNORED);
    gradcheck(loss, &leaves, 1e-6, 1e-7).unwrap();
}

#[test]
fn errors_stay_within_twice_those_of_the_formula() {
    for (n_tokens, d, vocab_size) in [(1, 1, 1), (7, 13, 31), (64, 32, 257), (130, 16, 1000)] {
        let inputs = [noise(&[n_tokens, d], 4), noise(&[vocab_size, d], 5) * 2., targets(n_tokens, vocab_size)];
        for kind in [Kind::Float, Kind::BFloat16] {
            assert_rule(&format!("{n_tokens}x{d}x{vocab_size}"), kernel, plain, &inputs, kind);
        }
    }
}

#[test]
fn many_chunks_are_one_sum() {
    // Chunks have at most 64 rows of this vocabulary in f32, so 150 tokens make three.
    let (n_tokens, d, vocab_size) = (150, 4, 65_536);
    let inputs = [noise(&[n_tokens, d], 6), noise(&[vocab_size, d], 7) * 2., targets(n_tokens, vocab_size)];
    for kind in [Kind::Float, Kind::BFloat16] {
        assert_rule("chunks", kernel, plain, &inputs, kind);
    }
}

#[test]
fn token_losses_are_the_terms_of_the_mean() {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
        let (x, weight) = (noise(&[40, 8], 8).to_kind(kind), noise(&[90, 8], 9).to_kind(kind));
        let targets = targets(40, 90);
        let losses = token_losses(&x.set_requires_grad(true), &weight, &targets, IGNORED).unwrap();
        assert!(!losses.requires_grad());
        let want = reference::token_losses(&x, &weight, &targets, IGNORED);
        assert_eq!(losses.kind(), want.kind());
        assert_close("token losses", &losses, &want, 1e-5);
        assert!(losses.masked_select(&targets.eq(IGNORED)).eq(0.).all().int64_value(&[]) == 1);
        let mean = linear_cross_entropy(&x.detach(), &weight, &targets, IGNORED).unwrap();
        let n_counted = targets.ne(IGNORED).sum(Kind::Int64).int64_value(&[]) as f64;
        assert_close("mean", &mean, &(losses.sum(Kind::Double) / n_counted), 1e-6);
    }
}

#[test]
fn without_a_gradient_the_loss_is_the_same() {
    let inputs = [noise(&[33, 8], 10).to_kind(Kind::Float), noise(&[70, 8], 11).to_kind(Kind::Float), targets(33, 70)];
    let recorded = value_and_grads(kernel, &inputs).remove(0);
    assert!(recorded.equal(&kernel(&inputs).unwrap()));
}

#[test]
fn a_scaled_loss_scales_its_gradients() {
    let inputs = [noise(&[9, 4], 12), noise(&[20, 4], 13), targets(9, 20)];
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
        let (x, weight) = (inputs[0].to_kind(kind), inputs[1].to_kind(kind));
        let grads = |factor: f64| {
            let (x, weight) = (x.detach().set_requires_grad(true), weight.detach().set_requires_grad(true));
            (linear_cross_entropy(&x, &weight, &inputs[2], IGNORED).unwrap() * factor).backward();
            [x.grad(), weight.grad()]
        };
        for (one, quarter) in grads(1.).iter().zip(&grads(0.25)) {
            assert_eq!(quarter.kind(), kind);
            assert!((one * 0.25).equal(quarter));
        }
    }
}

#[test]
fn only_the_wanted_gradients_are_made() {
    let (x, weight) = (noise(&[6, 4], 14), noise(&[9, 4], 15));
    let both = value_and_grads(kernel, &[x.shallow_clone(), weight.shallow_clone(), targets(6, 9)]);
    let direction = noise(&[], 99).double_value(&[]);
    let x_leaf = x.detach().set_requires_grad(true);
    (linear_cross_entropy(&x_leaf, &weight, &targets(6, 9), IGNORED).unwrap() * direction).backward();
    assert!(x_leaf.grad().equal(&both[1]));
    let weight_leaf = weight.detach().set_requires_grad(true);
    (linear_cross_entropy(&x, &weight_leaf, &targets(6, 9), IGNORED).unwrap() * direction).backward();
    assert!(weight_leaf.grad().equal(&both[2]));
}

#[test]
fn the_graph_may_be_walked_twice() {
    let x = noise(&[6, 4], 16).set_requires_grad(true);
    let loss = linear_cross_entropy(&x, &noise(&[9, 4], 17), &targets(6, 9), IGNORED).unwrap();
    let once = Tensor::run_backward(&[&loss], &[&x], true, false).remove(0);
    let mut first = once.copy();
    let _ = first.g_add_(&Tensor::run_backward(&[&loss], &[&x], false, false)[0]);
    assert!(first.equal(&(once * 2.)));
}

#[test]
fn if_all_is_ignored_loss_and_gradients_are_zero() {
    for n_tokens in [0, 5] {
        let ignored = Tensor::full([n_tokens], IGNORED, (Kind::Int64, Device::Cpu));
        let inputs = [noise(&[n_tokens, 3], 18).to_kind(Kind::Float), noise(&[8, 3], 19).to_kind(Kind::Float), ignored];
        let results = value_and_grads(kernel, &inputs);
        assert_eq!(results[0].double_value(&[]), 0.);
        assert!(results[1].equal(&inputs[0].zeros_like()));
        assert!(results[2].equal(&inputs[1].zeros_like()));
    }
}

#[test]
fn any_value_may_mean_ignored() {
    let (x, weight) = (noise(&[4, 3], 20), noise(&[5, 3], 21));
    let targets = Tensor::from_slice(&[0i64, 3, 0, 4]);
    let got = linear_cross_entropy(&x, &weight, &targets, 0).unwrap();
    assert_close("ignored 0", &got, &reference::linear_cross_entropy(&x, &weight, &targets, 0), 1e-12);
}

#[test]
fn extreme_logits_stay_finite_and_exact() {
    let x = Tensor::from_slice(&[1e4f32, -1e4, 1e4]).view([3, 1]);
    let weight = Tensor::from_slice(&[1f32, 0., -1.]).view([3, 1]);
    let targets = Tensor::from_slice(&[0i64, 0, 1]);
    let losses = token_losses(&x, &weight, &targets, IGNORED).unwrap();
    assert_eq!(Vec::<f32>::try_from(losses).unwrap(), [0., 2e4, 1e4]);
    let results = value_and_grads(kernel, &[x, weight, targets]);
    assert_eq!(results[0].double_value(&[]), 1e4);
    assert!(results.iter().all(|t| bool::try_from(t.isfinite().all()).unwrap()), "{results:?}");
}

#[test]
fn a_nan_is_not_hidden() {
    let x = Tensor::from_slice(&[f32::NAN, 1.]).view([2, 1]);
    let loss = kernel(&[x, Tensor::ones([3, 1], (Kind::Float, Device::Cpu)), Tensor::from_slice(&[0i64, 1])]).unwrap();
    assert!(loss.double_value(&[]).is_nan());
}

#[test]
fn strided_arguments_count_like_contiguous_ones() {
    let (x, weight) = (noise(&[8, 30], 22).to_kind(Kind::Float), noise(&[8, 40], 23).to_kind(Kind::Float));
    let targets = targets(60, 40).slice(0, 0, 60, 2);
    let strided = value_and_grads(kernel, &[x.tr(), weight.tr(), targets.shallow_clone()]);
    let contiguous = value_and_grads(kernel, &[x.tr().contiguous(), weight.tr().contiguous(), targets.contiguous()]);
    assert!(strided.iter().zip(&contiguous).all(|(a, b)| a.equal(b)));
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    assert_same_on_any_threads(|| {
        let (x, weight) = (noise(&[257, 16], 24).to_kind(Kind::Float), noise(&[509, 16], 25).to_kind(Kind::Float));
        value_and_grads(kernel, &[x, weight, targets(257, 509)])
    });
}

#[test]
fn bad_arguments_are_named() {
    let f32s = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let message = |x: &Tensor, w: &Tensor, t: &Tensor| linear_cross_entropy(x, w, t, IGNORED).unwrap_err().to_string();
    let (x, weight) = (f32s(&[3, 2]), f32s(&[5, 2]));
    let good = Tensor::from_slice(&[0i64, 1, 2]);
    assert_eq!(
        message(&x, &weight, &Tensor::from_slice(&[0i64, 1, 5])),
        "linear_cross_entropy: targets_t[2] is 5, expected 0..5 or -100, which is ignored"
    );
    assert!(message(&x, &weight, &Tensor::from_slice(&[0i64, -1, 2])).contains("targets_t[1] is -1"));
    assert!(message(&x, &weight, &Tensor::from_slice(&[0i64, 1])).contains("targets_t has shape [2], expected [3]"));
    assert!(message(&x, &f32s(&[5, 3]), &good).contains("weight_vd has shape [5, 3], expected [5, 2]"));
    assert!(message(&f32s(&[1, 3, 2]), &weight, &good).contains("x_td has shape [1, 3, 2]"));
    assert!(message(&x, &weight.to_kind(Kind::BFloat16), &good).contains("weight_vd is BFloat16"));
    assert!(message(&x, &weight, &good.to_kind(Kind::Int)).contains("targets_t is Int"));
    assert!(message(&x, &f32s(&[0, 2]), &good).contains("vocabulary is empty"));
}
