use flowhn_nn::{Init, Params, SwiGluMlp, reference, swiglu};
use flowhn_torch::testing::{assert_close, gradcheck};
use tch::{Device, Kind, Tensor};

use crate::support::{assert_rule, assert_same_on_any_threads, noise, value_and_grads};

fn kernel(inputs: &[Tensor]) -> flowhn_nn::Result<Tensor> {
    swiglu(&inputs[0])
}

fn plain(inputs: &[Tensor]) -> Tensor {
    reference::swiglu(&inputs[0])
}

#[test]
fn gradients_agree_with_differences() {
    gradcheck(kernel, &[(noise(&[2, 3, 10], 1) * 3.).set_requires_grad(true)], 1e-6, 1e-6).unwrap();
}

#[test]
fn errors_stay_within_twice_those_of_the_formula() {
    for shape in [&[5, 2][..], &[1, 2], &[13, 134], &[2, 31, 344], &[0, 8], &[3, 0, 8], &[62]] {
        for kind in [Kind::Float, Kind::BFloat16] {
            assert_rule(&format!("{shape:?}"), kernel, plain, &[noise(shape, 2) * 6.], kind);
        }
    }
}

#[test]
fn strided_inputs_count_like_contiguous_ones() {
    let base = noise(&[6, 4, 20], 3).to_kind(Kind::Float);
    for view in [base.narrow(2, 3, 12), base.transpose(0, 1), base.slice(2, 0, 20, 2)] {
        let strided = value_and_grads(kernel, &[view.shallow_clone()]);
        let contiguous = value_and_grads(kernel, &[view.contiguous()]);
        assert!(strided.iter().zip(&contiguous).all(|(a, b)| a.equal(b)), "{:?}", view.stride());
    }
}

#[test]
fn extreme_gates_stay_finite() {
    let x = Tensor::from_slice(&[1e4f32, -1e4, 88., 3., -3., 2.]);
    let results = value_and_grads(kernel, &[x]);
    assert!(results.iter().all(|t| bool::try_from(t.isfinite().all()).unwrap()), "{results:?}");
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    assert_same_on_any_threads(|| value_and_grads(kernel, &[noise(&[1031, 66], 4).to_kind(Kind::Float)]));
}

#[test]
fn bad_arguments_are_named() {
    let message = |x: Tensor| swiglu(&x).unwrap_err().to_string();
    let f32s = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    assert_eq!(message(f32s(&[2, 3])), "swiglu: gate_up has shape [2, 3], expected [.., 2 f] with f >= 1");
    assert!(message(f32s(&[])).contains("shape []"));
    assert!(message(f32s(&[4]).to_kind(Kind::Int64)).contains("gate_up is Int64"));
}

#[test]
fn the_mlp_is_its_formula() {
    let mut params = Params::new(Device::Cpu, 5);
    let init = Init::Normal { std: 0.3 };
    let mlp =
        SwiGluMlp::new(&mut params.root().push("mlp"), 6, 10, init.clone(), init, &flowhn_nn::Bias::None).unwrap();
    assert_eq!(
        params.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(),
        ["mlp.gate_up_proj.weight", "mlp.down_proj.weight"]
    );
    assert_eq!(mlp.gate_up_proj().weight().size(), [20, 6]);
    assert_eq!(mlp.down_proj().weight().size(), [6, 10]);
    let x = noise(&[2, 3, 6], 6).to_kind(Kind::Float);
    let gate_up = x.matmul(&mlp.gate_up_proj().weight().master().tr());
    let (gate, up) = (gate_up.narrow(-1, 0, 10), gate_up.narrow(-1, 10, 10));
    let want = (gate.silu() * up).matmul(&mlp.down_proj().weight().master().tr());
    assert_close("mlp", &mlp.forward(&x).unwrap(), &want, 1e-5);
    assert_eq!(mlp.forward(x.to_kind(Kind::BFloat16)).unwrap().kind(), Kind::BFloat16);
}
