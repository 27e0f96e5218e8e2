//! Gather, split and merge against index operations of libtorch.

mod common;

use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

use common::{noise, routes};
use flowhn_fuse::{Route, gather, gather_norm, merge, merge_residual, split};
use flowhn_torch::testing::gradcheck;

/// Runs of tokens for attention and the SSM in turn; a first run of 0 lets the SSM begin.
fn runs() -> impl Strategy<Value = Vec<usize>> {
    (0..4usize, prop::collection::vec(1..6usize, 0..9)).prop_map(|(first, rest)| {
        let mut runs = vec![first];
        runs.extend(rest);
        runs
    })
}

/// A partition with more spans than are copied one by one.
fn alternating() -> Vec<usize> {
    vec![1; 201]
}

fn select(x: &Tensor, route: &Route) -> Tensor {
    x.index_select(1, route.positions_tensor())
}

/// Merging as a concatenation and the permutation that puts it in order.
fn merged(a: &Tensor, s: &Tensor, attn: &Route, ssm: &Route) -> Tensor {
    let order = Tensor::cat(&[attn.positions_tensor(), ssm.positions_tensor()], 0).argsort(0, false);
    Tensor::cat(&[a, s], 1).index_select(1, &order)
}

fn leaf(x: &Tensor) -> Tensor {
    x.detach().copy().set_requires_grad(true)
}

fn grads(outputs: &[Tensor], wrt: &[&Tensor]) -> Vec<Tensor> {
    let loss = outputs
        .iter()
        .enumerate()
        .map(|(i, y)| (y * noise(&y.size(), 90 + i as u64, y.kind())).sum(Kind::Double))
        .reduce(|a, b| a + b);
    Tensor::run_backward(&[loss.unwrap()], wrt, false, false)
}

fn check_partition(runs: &[usize]) {
    let (attn, ssm) = routes(runs);
    let l = attn.seq_len() as i64;
    let x = leaf(&noise(&[2, l, 3], 1, Kind::Float));

    let (a, s) = split(&x, &attn, &ssm).unwrap();
    for (part, route) in [(&a, &attn), (&s, &ssm)] {
        assert_eq!(*part, select(&x, route), "split of {runs:?}");
        assert_eq!(gather(&x, route).unwrap(), select(&x, route), "gather of {runs:?}");
    }
    assert_eq!(merge(&a, &s, &attn, &ssm).unwrap(), x, "round trip of {runs:?}");
    if l == 0 {
        return;
    }

    let want = grads(&[select(&x, &attn), select(&x, &ssm)], &[&x]);
    assert_eq!(grads(&[a, s], &[&x]), want, "gradient of split {runs:?}");
    let gathered = [gather(&x, &attn).unwrap(), gather(&x, &ssm).unwrap()];
    assert_eq!(grads(&gathered, &[&x]), want, "gradient of gather {runs:?}");

    let a = leaf(&noise(&[2, attn.len() as i64, 3], 2, Kind::Float));
    let s = leaf(&noise(&[2, ssm.len() as i64, 3], 3, Kind::Float));
    let reference = merged(&a, &s, &attn, &ssm);
    let ours = merge(&a, &s, &attn, &ssm).unwrap();
    assert_eq!(ours, reference);
    let used: Vec<&Tensor> = [&a, &s].into_iter().filter(|x| x.numel() > 0).collect();
    assert_eq!(grads(&[ours], &used), grads(&[reference.shallow_clone()], &used), "gradient of merge {runs:?}");

    let ours = merge_residual(&x, &a, &s, &attn, &ssm).unwrap();
    assert_eq!(ours, &x + &reference);
    let used: Vec<&Tensor> = [&x].into_iter().chain(used).collect();
    let reference = &x + merged(&a, &s, &attn, &ssm);
    assert_eq!(grads(&[ours], &used), grads(&[reference], &used), "gradient of merge_residual {runs:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn partitions_come_back_and_their_gradients_are_those_of_indexing(runs in runs()) {
        check_partition(&runs);
    }
}

#[test]
fn many_spans_take_the_path_by_index() {
    check_partition(&alternating());
}

#[test]
fn routes_that_overlap_or_leave_gaps_gather_too() {
    let x = leaf(&noise(&[2, 9, 3], 4, Kind::Float));
    let early = Route::new(9, &[0..4, 6..7], Device::Cpu).unwrap();
    let late = Route::new(9, &[3..5, 6..9], Device::Cpu).unwrap();
    let (a, s) = split(&x, &early, &late).unwrap();
    let want = grads(&[select(&x, &early), select(&x, &late)], &[&x]);
    assert_eq!(grads(&[a, s], &[&x]), want);
    let error = merge(&select(&x, &early), &select(&x, &late), &early, &late).unwrap_err().to_string();
    assert!(error.contains("share out") && error.contains("[0..4, 6..7]"), "{error}");
}

#[test]
fn one_span_is_a_view() {
    let (attn, ssm) = routes(&[4, 6]);
    for x in [noise(&[2, 10, 8], 5, Kind::Float), leaf(&noise(&[2, 10, 8], 5, Kind::Float))] {
        let start_of = |span_start: i64| x.narrow(1, span_start, 1).data_ptr();
        let (a, s) = split(&x, &attn, &ssm).unwrap();
        assert_eq!((a.data_ptr(), s.data_ptr()), (start_of(0), start_of(4)));
        assert_eq!(gather(&x, &ssm).unwrap().data_ptr(), start_of(4));
        let all = Route::all(10, Device::Cpu).unwrap();
        let (a, s) = split(&x, &all, &all).unwrap();
        assert_eq!([a.data_ptr(), s.data_ptr(), gather(&x, &all).unwrap().data_ptr()], [x.data_ptr(); 3]);
    }
    // Wrapped windows cannot be views; they are contiguous copies.
    let (wrapped, rest) = routes(&[2, 5, 3]);
    let x = noise(&[2, 10, 8], 5, Kind::Float);
    let (a, s) = split(&x, &wrapped, &rest).unwrap();
    assert!(a.is_contiguous() && s.data_ptr() == x.narrow(1, 2, 1).data_ptr());
}

#[test]
fn both_branches_reading_everything_sum_their_gradients() {
    let all = Route::all(5, Device::Cpu).unwrap();
    let x = leaf(&noise(&[2, 5, 3], 6, Kind::Float));
    let (a, s) = split(&x, &all, &all).unwrap();
    let weights = noise(&[2, 5, 3], 90, Kind::Float) + noise(&[2, 5, 3], 91, Kind::Float);
    assert_eq!(grads(&[a, s], &[&x]), [weights]);
}

#[test]
fn a_branch_that_nothing_comes_back_from_gets_zeros() {
    let (attn, ssm) = routes(&[3, 4]);
    let x = leaf(&noise(&[2, 7, 3], 7, Kind::Float));
    let (_, s) = split(&x, &attn, &ssm).unwrap();
    let grad = grads(&[s], &[&x]).remove(0);
    assert_eq!(grad.narrow(1, 0, 3).abs().max().double_value(&[]), 0.);
    assert_eq!(grad.narrow(1, 3, 4), noise(&[2, 4, 3], 90, Kind::Float));
}

#[test]
fn a_branch_without_tokens_leaves_the_other_alone() {
    let (all, none) = (Route::all(4, Device::Cpu).unwrap(), Route::none(4, Device::Cpu).unwrap());
    let x = leaf(&noise(&[2, 4, 3], 8, Kind::Float));
    let (a, s) = split(&x, &all, &none).unwrap();
    assert_eq!((a.data_ptr(), s.size()), (x.data_ptr(), vec![2, 0, 3]));
    assert!(!s.requires_grad());
    assert_eq!(merge(&a, &s, &all, &none).unwrap().data_ptr(), x.data_ptr());
    assert_eq!(merge(&s, &a, &none, &all).unwrap().data_ptr(), x.data_ptr());
    assert_eq!(merge_residual(&x, &s, &a, &none, &all).unwrap(), &x + &x);
}

#[test]
fn gradients_match_finite_differences() {
    let (attn, ssm) = routes(&[1, 2, 2, 1]);
    let x = leaf(&noise(&[2, 6, 2], 9, Kind::Double));
    gradcheck(
        |inputs| {
            let (a, s) = split(&inputs[0], &attn, &ssm)?;
            let first = gather(&inputs[0], &attn)?;
            merge_residual(&inputs[0], &(a.sin() * first), &s.cos(), &attn, &ssm)
        },
        &[x],
        1e-5,
        1e-7,
    )
    .unwrap();
}

#[test]
fn any_type_and_any_strides() {
    let (attn, ssm) = routes(&[2, 3, 2]);
    for kind in [Kind::Int64, Kind::BFloat16, Kind::Double, Kind::Float] {
        let x = noise(&[7, 2, 3], 10, Kind::Double).g_mul_scalar(50.).to_kind(kind).transpose(0, 1);
        let (a, s) = split(&x, &attn, &ssm).unwrap();
        assert_eq!(a, select(&x, &attn));
        assert_eq!(merge(&a, &s, &attn, &ssm).unwrap(), x);
        assert_eq!(merge_residual(&x, &a, &s, &attn, &ssm).unwrap(), &x + &x);
    }
}

#[test]
fn gather_norm_is_gather_then_norm() {
    let mut params = flowhn_nn::Params::new(Device::Cpu, 0);
    let norm = flowhn_nn::RmsNorm::new(&mut params.root(), "norm", 3, 1e-6).unwrap();
    let (attn, _) = routes(&[2, 3, 2]);
    let x = noise(&[2, 7, 3], 11, Kind::Float);
    let want = norm.forward(&select(&x, &attn)).unwrap();
    assert_eq!(gather_norm(&x, &attn, &norm).unwrap(), want);
}

#[test]
fn mistakes_are_named() {
    let (attn, ssm) = routes(&[2, 3]);
    let (x, a, s) =
        (noise(&[2, 5, 3], 0, Kind::Float), noise(&[2, 2, 3], 0, Kind::Float), noise(&[2, 3, 3], 0, Kind::Float));
    let message = |result: flowhn_fuse::Result<Tensor>| result.unwrap_err().to_string();
    let short = x.narrow(1, 0, 4);
    assert!(message(gather(&short, &attn)).contains("gather: x_bld has shape [2, 4, 3], expected [2, 5, 3]"));
    assert!(message(gather(&x.select(0, 0), &attn)).contains("[batch, seq_len, d]"));
    assert!(message(split(&short, &attn, &ssm).map(|(a, _)| a)).starts_with("split: x_bld"));
    assert!(message(merge(&s, &a, &attn, &ssm)).starts_with("merge: a_bnd has shape [2, 3, 3], expected [2, 2, 3]"));
    assert!(message(merge(&a, &a, &attn, &ssm)).starts_with("merge: s_bmd"));
    assert!(message(merge(&a, &s.to_kind(Kind::Double), &attn, &ssm)).contains("s_bmd is Double, expected Float"));
    assert!(message(merge_residual(&short, &a, &s, &attn, &ssm)).starts_with("merge_residual: x_bld"));
    assert!(message(merge_residual(&x.to_kind(Kind::Double), &a, &s, &attn, &ssm)).contains("x_bld is Double"));
    let narrow = x.narrow(2, 0, 2);
    assert!(
        message(merge_residual(&narrow, &a, &s, &attn, &ssm)).contains("a_bnd has shape [2, 2, 3], expected [2, 2, 2]")
    );
}
