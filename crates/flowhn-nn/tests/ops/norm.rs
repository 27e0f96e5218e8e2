use flowhn_nn::{Params, RmsNorm, reference, rms_norm};
use flowhn_torch::testing::{assert_close, gradcheck};
use tch::{Device, Kind, Tensor};

use crate::support::{assert_rule, assert_same_on_any_threads, noise, value_and_grads};

const EPS: f64 = 1e-6;

fn kernel(inputs: &[Tensor]) -> flowhn_nn::Result<Tensor> {
    rms_norm(&inputs[0], &inputs[1], EPS)
}

fn plain(inputs: &[Tensor]) -> Tensor {
    reference::rms_norm(&inputs[0], &inputs[1], EPS)
}

#[test]
fn gradients_agree_with_differences() {
    let inputs = [noise(&[2, 3, 7], 1).set_requires_grad(true), (noise(&[7], 2) + 1.).set_requires_grad(true)];
    gradcheck(kernel, &inputs, 1e-6, 1e-6).unwrap();
}

#[test]
fn errors_stay_within_twice_those_of_the_formula() {
    for shape in [&[5, 1][..], &[1, 1], &[13, 67], &[2, 31, 128], &[300, 129], &[0, 8], &[3, 0, 8], &[64]] {
        let d = *shape.last().unwrap();
        let inputs = [noise(shape, 3) * 3., noise(&[d], 4) + 1.];
        for kind in [Kind::Float, Kind::BFloat16] {
            assert_rule(&format!("{shape:?}"), kernel, plain, &inputs, kind);
        }
    }
}

#[test]
fn bf16_values_are_rounded_where_the_formula_rounds() {
    let x = noise(&[40, 96], 5).to_kind(Kind::BFloat16);
    let weight = (noise(&[96], 6) + 1.).to_kind(Kind::BFloat16);
    let (got, want) = (kernel(&[x.shallow_clone(), weight.shallow_clone()]).unwrap(), plain(&[x, weight]));
    // The statistics may differ in the last bit of f32, which moves few of the rounded values.
    let differing = got.ne_tensor(&want).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
    assert!(differing < 0.01, "{differing} of the values differ");
}

#[test]
fn a_f32_weight_serves_bf16_activations() {
    let x = noise(&[9, 16], 7).to_kind(Kind::BFloat16);
    let weight = (noise(&[16], 8) + 1.).to_kind(Kind::Float);
    let results = value_and_grads(kernel, &[x.shallow_clone(), weight.shallow_clone()]);
    assert_eq!(results.iter().map(Tensor::kind).collect::<Vec<_>>(), [Kind::BFloat16, Kind::BFloat16, Kind::Float]);
    let wide = [x.to_kind(Kind::Double), weight.to_kind(Kind::Double)];
    for (got, want) in results.iter().zip(value_and_grads(kernel, &wide)) {
        assert_close("bf16 beside f32", got, &want, 1e-2);
    }
}

#[test]
fn strided_inputs_and_gradients_count_like_contiguous_ones() {
    let base = noise(&[6, 4, 20], 9).to_kind(Kind::Float);
    let weight = (noise(&[10], 10) + 1.).to_kind(Kind::Float);
    let views = [
        base.narrow(2, 3, 10),
        base.narrow(2, 0, 10).transpose(0, 1),
        base.slice(2, 0, 20, 2),
        base.narrow(0, 0, 1).narrow(2, 0, 10).expand([5, 4, 10], false),
    ];
    for view in views {
        let strided = value_and_grads(kernel, &[view.shallow_clone(), weight.shallow_clone()]);
        let contiguous = value_and_grads(kernel, &[view.contiguous(), weight.shallow_clone()]);
        assert!(strided.iter().zip(&contiguous).all(|(a, b)| a.equal(b)), "{:?}", view.stride());
    }
    // The gradient of a sum is one element, expanded.
    let x = base.narrow(2, 0, 10).contiguous().set_requires_grad(true);
    rms_norm(&x, &weight, EPS).unwrap().sum(Kind::Float).backward();
    let leaf = x.detach().set_requires_grad(true);
    reference::rms_norm(&leaf, &weight, EPS).sum(Kind::Float).backward();
    assert_close("gradient of a sum", &x.grad(), &leaf.grad(), 1e-5);
}

#[test]
fn large_and_zero_rows_stay_finite() {
    let x = Tensor::from_slice(&[0f32, 0., 1e18, -1e18, 1e-30, 0.]).view([3, 2]).set_requires_grad(true);
    let weight = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let results = value_and_grads(kernel, &[x, weight]);
    assert!(results.iter().all(|t| bool::try_from(t.isfinite().all()).unwrap()), "{results:?}");
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    assert_same_on_any_threads(|| {
        let inputs = [noise(&[1031, 67], 11).to_kind(Kind::Float), noise(&[67], 12).to_kind(Kind::Float)];
        value_and_grads(kernel, &inputs)
    });
}

#[test]
fn bad_arguments_are_named() {
    let f32s = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let message = |x: &Tensor, weight: &Tensor| rms_norm(x, weight, EPS).unwrap_err().to_string();
    assert_eq!(message(&f32s(&[2, 3]), &f32s(&[4])), "rms_norm: weight has shape [4], expected [3]");
    assert!(message(&f32s(&[2, 0]), &f32s(&[0])).contains("x has shape [2, 0]"));
    assert!(message(&f32s(&[]), &f32s(&[1])).contains("x has shape []"));
    assert!(message(&f32s(&[2, 3]).to_kind(Kind::Int64), &f32s(&[3])).contains("x is Int64"));
    assert!(message(&f32s(&[2, 3]), &f32s(&[3]).to_kind(Kind::Double)).contains("weight is Double"));
    assert!(message(&f32s(&[2, 3]).to_kind(Kind::Half), &f32s(&[3])).contains("x is Half"));
}

#[test]
fn the_layer_starts_as_ones_and_is_not_decayed() {
    let mut params = Params::new(Device::Cpu, 0);
    let norm = RmsNorm::new(&mut params.root(), "norm", 6, EPS).unwrap();
    let param = params.get("norm.weight").unwrap();
    assert_eq!(param.decay, flowhn_nn::Decay::No);
    assert_eq!(norm.eps(), EPS);
    let x = noise(&[3, 6], 13);
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
        let x = x.to_kind(kind);
        let y = norm.forward(&x).unwrap();
        assert_eq!(y.kind(), kind);
        let want = reference::rms_norm(&x, &Tensor::ones([6], (kind, Device::Cpu)), EPS);
        assert_close("layer", &y, &want, if kind == Kind::BFloat16 { 1e-2 } else { 1e-6 });
    }
    let loss = norm.forward(&x.to_kind(Kind::BFloat16)).unwrap().sum(Kind::Float);
    loss.backward();
    assert_eq!(norm.weight().master().grad().kind(), Kind::Float);
}
