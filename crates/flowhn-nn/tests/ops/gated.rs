use flowhn_nn::{Params, RmsNorm, gated_rms_norm, reference};
use flowhn_torch::testing::{assert_close, gradcheck};
use tch::{Device, Kind, Tensor};

use crate::support::{assert_rule, assert_same_on_any_threads, noise, value_and_grads};

const EPS: f64 = 1e-5;

fn kernel(n_groups: i64) -> impl Fn(&[Tensor]) -> flowhn_nn::Result<Tensor> {
    move |inputs| gated_rms_norm(&inputs[0], &inputs[1], &inputs[2], EPS, n_groups)
}

fn plain(n_groups: i64) -> impl Fn(&[Tensor]) -> Tensor {
    move |inputs| reference::gated_rms_norm(&inputs[0], &inputs[1], &inputs[2], EPS, n_groups)
}

fn inputs(shape: &[i64]) -> [Tensor; 3] {
    [noise(shape, 1) * 2., noise(shape, 2) * 3., noise(&shape[shape.len() - 1..], 3) + 1.]
}

#[test]
fn gradients_agree_with_differences() {
    for n_groups in [1, 2, 6] {
        let inputs = inputs(&[2, 2, 6]).map(|x| x.set_requires_grad(true));
        gradcheck(kernel(n_groups), &inputs, 1e-6, 1e-6).unwrap();
    }
}

#[test]
fn errors_stay_within_twice_those_of_the_formula() {
    let cases = [(&[5, 1][..], 1), (&[13, 67], 1), (&[2, 31, 128], 4), (&[300, 130], 2), (&[0, 8], 2), (&[64], 8)];
    for (shape, n_groups) in cases {
        for kind in [Kind::Float, Kind::BFloat16] {
            assert_rule(&format!("{shape:?}/{n_groups}"), kernel(n_groups), plain(n_groups), &inputs(shape), kind);
        }
    }
}

#[test]
fn strided_inputs_count_like_contiguous_ones() {
    let base = noise(&[6, 4, 24], 4).to_kind(Kind::Float);
    let weight = (noise(&[12], 5) + 1.).to_kind(Kind::Float);
    let (x, z) = (base.narrow(2, 0, 12).transpose(0, 1), base.narrow(2, 12, 12).transpose(0, 1));
    let strided = value_and_grads(kernel(3), &[x.shallow_clone(), z.shallow_clone(), weight.shallow_clone()]);
    let contiguous = value_and_grads(kernel(3), &[x.contiguous(), z.contiguous(), weight]);
    assert!(strided.iter().zip(&contiguous).all(|(a, b)| a.equal(b)));
}

#[test]
fn an_open_gate_scales_nothing_away() {
    // silu(z) is z for large z, and the norm removes the common factor.
    let x = noise(&[7, 32], 6).to_kind(Kind::Float);
    let weight = noise(&[32], 7).to_kind(Kind::Float);
    let gated = gated_rms_norm(&x, &x.full_like(1e4), &weight, 0., 1).unwrap();
    assert_close("open gate", &gated, &flowhn_nn::rms_norm(&x, &weight, 0.).unwrap(), 1e-6);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    assert_same_on_any_threads(|| {
        let inputs = inputs(&[1031, 66]).map(|x| x.to_kind(Kind::Float));
        value_and_grads(kernel(2), &inputs)
    });
}

#[test]
fn bad_arguments_are_named() {
    let f32s = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let message = |x: &Tensor, z: &Tensor, w: &Tensor, n: i64| gated_rms_norm(x, z, w, EPS, n).unwrap_err().to_string();
    let (x, w) = (f32s(&[2, 6]), f32s(&[6]));
    assert!(message(&x, &f32s(&[2, 5]), &w, 1).contains("z has shape [2, 5], expected [2, 6]"));
    assert!(message(&x, &x.to_kind(Kind::BFloat16), &w, 1).contains("z is BFloat16"));
    assert!(message(&x, &x, &f32s(&[5]), 1).contains("weight has shape [5]"));
    assert!(message(&x, &x, &w, 4).contains("4 groups do not divide the last axis of 6"));
    assert!(message(&x, &x, &w, 0).contains("0 groups"));
}

#[test]
fn the_layer_normalises_groups() {
    let mut params = Params::new(Device::Cpu, 0);
    let norm = RmsNorm::new(&mut params.root(), "norm", 8, EPS).unwrap();
    let (x, z) = (noise(&[3, 8], 8).to_kind(Kind::BFloat16), noise(&[3, 8], 9).to_kind(Kind::BFloat16));
    let want = reference::gated_rms_norm(&x, &z, &Tensor::ones([8], (Kind::Float, Device::Cpu)), EPS, 2);
    assert_close("layer", &norm.forward_gated(&x, &z, 2).unwrap(), &want, 1e-2);
}
