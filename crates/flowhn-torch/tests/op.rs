//! Operators by name, and the global switches.

mod common;

use common::{leaf, values};
use flowhn_torch::op::{Arg, call, schema};
use flowhn_torch::testing::assert_close;
use flowhn_torch::{Error, Flag, torch_lib_dir};
use tch::{Device, Kind, Tensor};

fn one(name: &str, overload: &str, args: &[Arg]) -> Tensor {
    let mut results = call(name, overload, args).unwrap();
    assert_eq!(results.len(), 1, "{name}");
    results.remove(0).expect("a defined tensor")
}

fn message(name: &str, overload: &str, args: &[Arg]) -> String {
    match call(name, overload, args) {
        Err(Error::Torch(message)) => message,
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn the_fused_optimiser_step_follows_the_formula_of_adamw() {
    let (lr, beta1, beta2, decay, eps) = (0.1, 0.9, 0.95, 0.2, 1e-8);
    let start = [Tensor::from_slice(&[1f32, -2., 3.]), Tensor::from_slice(&[0.5f32, 4.]).view([2, 1])];
    let grads = [Tensor::from_slice(&[0.1f32, 0.2, -0.3]), Tensor::from_slice(&[-1f32, 1e-3]).view([2, 1])];
    let state = || -> Vec<Tensor> { start.iter().map(|p| p.copy()).collect() };
    let (params, mut want) = (state(), state());
    let zeros = || -> Vec<Tensor> { start.iter().map(Tensor::zeros_like).collect() };
    let (m, v, mut want_m, mut want_v) = (zeros(), zeros(), zeros(), zeros());
    let steps: Vec<Tensor> = start.iter().map(|_| Tensor::zeros([] as [i64; 0], (Kind::Float, Device::Cpu))).collect();
    for step in 1..=3 {
        for t in &steps {
            let _ = t.shallow_clone().g_add_scalar_(1.);
        }
        fn refs(tensors: &[Tensor]) -> Vec<&Tensor> {
            tensors.iter().collect()
        }
        let (params, grads_, m, v, steps) = (refs(&params), refs(&grads), refs(&m), refs(&v), refs(&steps));
        let results = call(
            "aten::_fused_adamw_",
            "",
            &[
                Arg::Tensors(&params),
                Arg::Tensors(&grads_),
                Arg::Tensors(&m),
                Arg::Tensors(&v),
                Arg::Tensors(&[]),
                Arg::Tensors(&steps),
                Arg::Double(lr),
                Arg::Double(beta1),
                Arg::Double(beta2),
                Arg::Double(decay),
                Arg::Double(eps),
                Arg::Bool(false),
                Arg::Bool(false),
            ],
        );
        assert!(results.unwrap().is_empty(), "the operator returns nothing");
        for i in 0..start.len() {
            want[i] = &want[i] * (1. - lr * decay);
            want_m[i] = &want_m[i] * beta1 + &grads[i] * (1. - beta1);
            want_v[i] = &want_v[i] * beta2 + &grads[i] * &grads[i] * (1. - beta2);
            let denominator = (&want_v[i] / (1. - beta2.powi(step))).sqrt() + eps;
            want[i] = &want[i] - &want_m[i] / (1. - beta1.powi(step)) / denominator * lr;
        }
    }
    for (got, want) in params.iter().zip(&want) {
        assert_close("parameter", got, want, 1e-6);
    }
}

#[test]
fn defaults_lists_numbers_and_undefined_results_come_through() {
    let x = Tensor::from_slice(&[1f32, 2., 3., 4., 5.]);
    // A missing trailing argument takes its default, `None` stands for an absent optional one.
    assert_eq!(one("aten::sum", "", &[Arg::Tensor(&x)]).double_value(&[]), 15.);
    assert_eq!(values(&one("aten::clamp", "", &[Arg::Tensor(&x), Arg::None, Arg::Double(2.)])), [1., 2., 2., 2., 2.]);
    // A list of tensors is flattened.
    let parts = call("aten::split_with_sizes", "", &[Arg::Tensor(&x), Arg::Ints(&[2, 3])]).unwrap();
    let sizes: Vec<i64> = parts.iter().flatten().flat_map(|part| part.size()).collect();
    assert_eq!(sizes, [2, 3]);
    // Numbers come as tensors without dimensions.
    assert_eq!(one("aten::size", "int", &[Arg::Tensor(&x), Arg::Int(0)]).int64_value(&[]), 5);
    assert_eq!(one("aten::is_nonzero", "", &[Arg::Tensor(&x.get(0))]).kind(), Kind::Bool);
    // Undefined results keep their place.
    let args = [
        Arg::Tensor(&x),
        Arg::Tensor(&x),
        Arg::Ints(&[5]),
        Arg::Tensor(&Tensor::from_slice(&[3f32])),
        Arg::Tensor(&Tensor::from_slice(&[0.5f32])),
        Arg::Tensor(&x),
        Arg::None,
        Arg::Ints(&[0, 1, 0]),
    ];
    let grads = call("aten::native_layer_norm_backward", "", &args).unwrap();
    let defined: Vec<bool> = grads.iter().map(Option::is_some).collect();
    assert_eq!(defined, [false, true, false]);
    let unique = call("aten::_unique2", "", &[Arg::Tensor(&x), Arg::Bool(true)]).unwrap();
    assert_eq!(unique.len(), 3);
}

#[test]
fn arguments_take_the_form_that_the_schema_asks_for() {
    let x = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
    // An integer where a float stands.
    let dropped = one("aten::dropout", "", &[Arg::Tensor(&x), Arg::Int(0), Arg::Bool(true)]);
    assert_eq!(values(&dropped), values(&x));
    // A list of optional tensors.
    let rows = Tensor::from_slice(&[1i64]);
    let columns = Tensor::from_slice(&[2i64, 0]);
    let picked = one("aten::index", "Tensor", &[Arg::Tensor(&x), Arg::Tensors(&[&rows, &columns])]);
    assert_eq!(values(&picked), [5., 3.]);
    let picked = one("aten::index", "Tensor", &[Arg::Tensor(&x), Arg::Tensors(&[&Tensor::new(), &columns])]);
    assert_eq!(picked.size(), [2, 2]);
    // Scalars of any type, a device by its name, a string, floats from integers.
    assert_eq!(values(&one("aten::mul", "Scalar", &[Arg::Tensor(&x), Arg::Int(2)]))[5], 10.);
    let (float, strided) = (6, 0);
    let options = [Arg::Ints(&[2]), Arg::Int(float), Arg::Int(strided), Arg::Str("cpu")];
    assert_eq!(one("aten::ones", "", &options).kind(), Kind::Float);
    let divided = one("aten::div", "Scalar_mode", &[Arg::Tensor(&x), Arg::Double(2.), Arg::Str("floor")]);
    assert_eq!(values(&divided), [0., 0., 1., 1., 2., 2.]);
    let image = x.view([1, 1, 2, 3]);
    let scaled = [Arg::Tensor(&image), Arg::None, Arg::Ints(&[2, 2])];
    assert_eq!(one("aten::upsample_nearest2d", "vec", &scaled).size(), [1, 1, 4, 6]);
    let scaled = [Arg::Tensor(&image), Arg::None, Arg::Doubles(&[2., 2.])];
    assert_eq!(one("aten::upsample_nearest2d", "vec", &scaled).size(), [1, 1, 4, 6]);
}

#[test]
fn operators_by_name_are_recorded_by_autograd() {
    let x = leaf(&[2., 3.]);
    one("aten::pow", "Tensor_Scalar", &[Arg::Tensor(&x), Arg::Int(3)]).sum(Kind::Double).backward();
    assert_eq!(values(&x.grad()), [12., 27.]);
}

#[test]
fn wrong_names_and_arguments_say_what_is_wrong() {
    let x = Tensor::from_slice(&[1f32, 2.]);
    assert!(message("aten::no_such_operator", "", &[]).contains("no_such_operator"));
    assert!(message("aten::sum", "no_such_overload", &[Arg::Tensor(&x)]).contains("no_such_overload"));
    assert!(message("no namespace", "", &[]).contains("no namespace"));
    assert!(message("aten::mul", "Tensor", &[Arg::Tensor(&x)]).contains("missing argument other"));
    assert!(message("aten::relu", "", &[Arg::Tensor(&x), Arg::Int(1)]).contains("2 arguments are too many"));
    for wrong in [Arg::Int(1), Arg::Double(1.), Arg::Bool(true), Arg::Ints(&[1]), Arg::Str("x"), Arg::None] {
        let error = message("aten::relu", "", &[wrong]);
        assert!(error.starts_with("argument self is a Tensor, not a "), "{error}");
    }
    let error = message("aten::split_with_sizes", "", &[Arg::Tensor(&x), Arg::Tensors(&[&x])]);
    assert!(error.starts_with("argument split_sizes is a List[int], not a List[Tensor]"), "{error}");
    let error = message("aten::dropout", "", &[Arg::Tensor(&x), Arg::Double(0.), Arg::Int(1)]);
    assert!(error.starts_with("argument train is a bool"), "{error}");
    // The operator's own complaint, one sentence without a C++ backtrace.
    let error = message("aten::mm", "", &[Arg::Tensor(&x), Arg::Tensor(&x)]);
    assert_eq!(error, "self must be a matrix");
    assert!(matches!(call("aten::re\0lu", "", &[]), Err(Error::Invalid { .. })));
}

#[test]
fn schemas_can_be_read() {
    let text = schema("aten::_fused_adamw_", "").unwrap();
    assert!(text.starts_with("aten::_fused_adamw_(Tensor(a!)[] self"), "{text}");
    assert!(matches!(schema("aten::no_such_operator", ""), Err(Error::Torch(_))));
}

#[test]
fn every_flag_can_be_set_read_and_put_back() {
    let flags = [
        Flag::Tf32Cublas,
        Flag::Tf32Cudnn,
        Flag::Bf16ReducedPrecisionReduction,
        Flag::Deterministic,
        Flag::DeterministicCudnn,
        Flag::DeterministicFill,
        Flag::SdpFlash,
        Flag::SdpMemEfficient,
        Flag::SdpMath,
        Flag::SdpCudnn,
    ];
    for flag in flags {
        let before = flag.is_set().unwrap();
        for on in [!before, before, !before] {
            flag.set(on).unwrap();
            assert_eq!(flag.is_set().unwrap(), on, "{flag:?}");
        }
        // No flag moves another one.
        let others: Vec<bool> = flags.iter().filter(|f| **f != flag).map(|f| f.is_set().unwrap()).collect();
        flag.set(before).unwrap();
        let after: Vec<bool> = flags.iter().filter(|f| **f != flag).map(|f| f.is_set().unwrap()).collect();
        assert_eq!(others, after, "{flag:?}");
    }
}

#[test]
fn the_folder_of_libtorch_holds_it() {
    assert!(torch_lib_dir().unwrap().join("libtorch_cpu.so").exists());
}
