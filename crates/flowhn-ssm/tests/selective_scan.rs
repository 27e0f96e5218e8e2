//! The selective scan against its plain reference.

mod common;

use common::{Case, normal, resets, results, same_bits, strided, widened, with_threads};
use flowhn_ssm::{
    DtActivation, Result, SelectiveScan, SelectiveScanOutput, SelectiveScanStep, reference, selective_scan,
    selective_scan_step,
};
use flowhn_torch::testing::assert_close;
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

const PARAMS: [&str; 4] = ["a", "d", "dt_bias", "initial_state"];

fn case(batch: i64, seq_len: i64, d_inner: i64, d_state: i64) -> Case {
    let ble = [batch, seq_len, d_inner];
    Case {
        what: format!("{batch} x {seq_len} x {d_inner} x {d_state}"),
        inputs: vec![
            ("x", normal(1, &ble)),
            ("dt", normal(2, &ble)),
            ("a", -normal(3, &[d_inner, d_state]).exp()),
            ("b", normal(4, &[batch, seq_len, d_state])),
            ("c", normal(5, &[batch, seq_len, d_state])),
            ("d", normal(6, &[d_inner])),
            ("z", normal(7, &ble)),
            ("dt_bias", normal(8, &[d_inner]) - 1.),
            ("initial_state", normal(9, &[batch, d_inner, d_state])),
        ],
        params: &PARAMS,
    }
}

fn args<'a>(t: &'a [Tensor], reset_bl: Option<&'a Tensor>) -> SelectiveScan<'a> {
    SelectiveScan {
        d_e: Some(&t[5]),
        z_ble: Some(&t[6]),
        dt_bias_e: Some(&t[7]),
        initial_state_ben: Some(&t[8]),
        reset_bl,
        ..SelectiveScan::new(&t[0], &t[1], &t[2], &t[3], &t[4])
    }
}

fn pair(out: SelectiveScanOutput) -> [Tensor; 2] {
    [out.y_ble, out.final_state_ben]
}

fn fast<'a>(reset_bl: Option<&'a Tensor>) -> impl Fn(&[Tensor]) -> Result<[Tensor; 2]> + 'a {
    move |t| selective_scan(&args(t, reset_bl)).map(pair)
}

fn plain<'a>(reset_bl: Option<&'a Tensor>) -> impl Fn(&[Tensor]) -> Result<[Tensor; 2]> + 'a {
    move |t| reference::selective_scan(&args(t, reset_bl)).map(pair)
}

#[test]
fn gradients_match_finite_differences() {
    let case = case(2, 19, 3, 2);
    case.check_gradients(&fast(None));
    case.check_gradients(&fast(Some(&resets(2, 19, 5))));
}

#[test]
fn without_the_optional_arguments_gradients_match_too() {
    let case = Case { inputs: case(1, 17, 2, 3).inputs.into_iter().take(5).collect(), ..case(1, 17, 2, 3) };
    for dt_activation in [DtActivation::Softplus, DtActivation::Identity] {
        case.check_gradients(&|t| {
            let args = SelectiveScan::new(&t[0], &t[1], &t[2], &t[3], &t[4]);
            selective_scan(&SelectiveScan { dt_activation, ..args }).map(pair)
        });
    }
}

#[test]
fn f64_equals_the_reference() {
    let shapes = [
        (1, 1, 1, 1),
        (2, 2, 3, 5),
        (1, 16, 32, 16),
        (2, 17, 33, 16),
        (3, 31, 64, 8),
        (1, 97, 65, 3),
        (2, 33, 130, 16),
    ];
    for (batch, seq_len, d_inner, d_state) in shapes {
        let case = case(batch, seq_len, d_inner, d_state);
        case.check_f64(&fast(None), &plain(None));
        for every in [1, 5, 23] {
            let reset_bl = resets(batch, seq_len, every);
            case.check_f64(&fast(Some(&reset_bl)), &plain(Some(&reset_bl)));
        }
    }
}

#[test]
fn strided_inputs_equal_contiguous_ones() {
    let case = case(3, 21, 34, 5);
    for layout in [strided, widened] {
        let op = |t: &[Tensor]| {
            let mut t: Vec<Tensor> = t.iter().map(Tensor::shallow_clone).collect();
            for i in [0, 1, 3, 4, 6] {
                t[i] = layout(&t[i]);
                assert!(!t[i].is_contiguous());
            }
            selective_scan(&args(&t, None)).map(pair)
        };
        case.check_f64(&op, &plain(None));
    }
    // Parameters and states too.
    let op = |t: &[Tensor]| {
        let mut t: Vec<Tensor> = t.iter().map(Tensor::shallow_clone).collect();
        (t[2], t[8]) = (strided(&t[2]), strided(&t[8]));
        selective_scan(&args(&t, None)).map(pair)
    };
    case.check_f64(&op, &plain(None));
}

#[test]
fn f32_and_bf16_are_as_exact_as_the_plain_form() {
    for case in [case(2, 37, 40, 16), case(1, 130, 96, 16), case(3, 1, 7, 4)] {
        let size = case.inputs[0].1.size();
        for reset_bl in [None, Some(resets(size[0], size[1], 23))] {
            for kind in [Kind::Float, Kind::BFloat16] {
                case.check_rounding(kind, &fast(reset_bl.as_ref()), &plain(reset_bl.as_ref()));
            }
        }
    }
}

#[test]
fn activations_may_stay_f32_beside_a_bf16_input() {
    let mut t = case(1, 9, 4, 3).leaves(Kind::BFloat16);
    t[1] = t[1].detach().to_kind(Kind::Float).set_requires_grad(true);
    let results = results(&fast(None), &t);
    assert_eq!(results[0].kind(), Kind::BFloat16);
    assert_eq!((results[2].kind(), results[3].kind()), (Kind::BFloat16, Kind::Float));
}

#[test]
fn scanning_in_pieces_equals_scanning_at_once() {
    let t = case(2, 41, 20, 6).leaves(Kind::Double);
    let reset_bl = resets(2, 41, 13);
    let whole = selective_scan(&args(&t, Some(&reset_bl))).unwrap();
    for cut in [1, 15, 16, 17, 40] {
        let run = |start: i64, len: i64, state: &Tensor| {
            let mut t: Vec<Tensor> = t.iter().map(Tensor::shallow_clone).collect();
            for i in [0, 1, 3, 4, 6] {
                t[i] = t[i].narrow(1, start, len);
            }
            t[8] = state.shallow_clone();
            selective_scan(&args(&t, Some(&reset_bl.narrow(1, start, len)))).unwrap()
        };
        let first = run(0, cut, &t[8]);
        let second = run(cut, 41 - cut, &first.final_state_ben);
        assert_close("y", &Tensor::cat(&[first.y_ble, second.y_ble], 1), &whole.y_ble, 1e-14);
        assert_close("state", &second.final_state_ben, &whole.final_state_ben, 1e-14);
    }
}

#[test]
fn steps_equal_the_scan() {
    let t = case(2, 9, 20, 6).leaves(Kind::Float);
    let reset_bl = resets(2, 9, 4);
    let whole = selective_scan(&args(&t, Some(&reset_bl))).unwrap();
    let _guard = tch::no_grad_guard();
    let mut state_ben = t[8].copy();
    for token in 0..9 {
        let at = |i: usize| t[i].select(1, token);
        let y_be = selective_scan_step(SelectiveScanStep {
            x_be: &at(0),
            dt_be: &at(1),
            a_en: &t[2],
            b_bn: &at(3),
            c_bn: &at(4),
            d_e: Some(&t[5]),
            z_be: Some(&at(6)),
            dt_bias_e: Some(&t[7]),
            dt_activation: DtActivation::Softplus,
            state_ben: &mut state_ben,
            reset_b: Some(&reset_bl.select(1, token)),
        })
        .unwrap();
        assert!(same_bits(&y_be, &whole.y_ble.select(1, token)), "token {token}");
    }
    assert!(same_bits(&state_ben, &whole.final_state_ben));
}

#[test]
fn a_token_leaves_those_before_it_alone() {
    let t = case(2, 40, 33, 16).leaves(Kind::Float);
    let before = selective_scan(&args(&t, None)).unwrap().y_ble;
    for token in [0, 1, 15, 16, 39] {
        for i in [0, 1, 3, 4, 6] {
            let mut changed: Vec<Tensor> = t.iter().map(Tensor::shallow_clone).collect();
            changed[i] = t[i].detach().copy();
            let _ = changed[i].select(1, token).fill_(3.);
            let after = selective_scan(&args(&changed, None)).unwrap().y_ble;
            assert!(same_bits(&after.narrow(1, 0, token), &before.narrow(1, 0, token)), "input {i}, token {token}");
            assert!(!same_bits(&after, &before));
        }
    }
}

#[test]
fn a_reset_forgets_even_what_is_not_finite() {
    let t = case(1, 24, 8, 4).leaves(Kind::Float);
    let mut reset_bl = Tensor::zeros([1, 24], (Kind::Bool, Device::Cpu));
    let _ = reset_bl.narrow(1, 10, 1).fill_(1);
    let clean = selective_scan(&args(&t, Some(&reset_bl))).unwrap().y_ble;
    let spoilt: Vec<Tensor> = t.iter().map(|t| t.detach().copy()).collect();
    let _ = spoilt[0].narrow(1, 0, 10).fill_(f64::INFINITY);
    let after = selective_scan(&args(&spoilt, Some(&reset_bl))).unwrap().y_ble;
    assert!(same_bits(&after.narrow(1, 10, 14), &clean.narrow(1, 10, 14)));
    reset_bl = Tensor::zeros([1, 24], (Kind::Bool, Device::Cpu));
    let without = selective_scan(&args(&t, Some(&reset_bl))).unwrap().y_ble;
    assert!(!same_bits(&without.narrow(1, 10, 14), &clean.narrow(1, 10, 14)));
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    // Large enough to be shared among threads.
    let leaves = || case(2, 70, 200, 16).leaves(Kind::Float);
    let run = |n_threads| with_threads(n_threads, || results(&fast(None), &leaves()));
    for (one, three) in run(1).iter().zip(&run(3)) {
        assert!(same_bits(one, three));
    }
}

#[test]
fn extreme_values_stay_finite_where_the_reference_does() {
    for (dt, a, x) in [(0., -1., 1.), (1e-8, -1e-4, 1.), (50., -1e4, 1.), (50., -1e-4, 1e4), (1e-8, -1e4, 1e6)] {
        let mut case = case(1, 40, 5, 4);
        case.what = format!("dt {dt}, a {a}, x {x}");
        case.inputs[0].1 *= x;
        case.inputs[1].1 = case.inputs[1].1.full_like(dt);
        case.inputs[2].1 = case.inputs[2].1.full_like(a);
        let identity = |t: &[Tensor], op: fn(&SelectiveScan) -> Result<SelectiveScanOutput>| {
            op(&SelectiveScan { dt_activation: DtActivation::Identity, dt_bias_e: None, ..args(t, None) }).map(pair)
        };
        // The bias takes no part here; without a gradient of its own it cannot be asked for one.
        case.inputs[7].1 = case.inputs[7].1.zeros_like();
        let with_bias =
            |out: Result<[Tensor; 2]>, t: &[Tensor]| out.map(|[y, state]| [y + t[7].sum(t[7].kind()) * 0., state]);
        case.check_rounding(Kind::Float, &|t| with_bias(identity(t, selective_scan), t), &|t| {
            with_bias(identity(t, reference::selective_scan), t)
        });
        let all = results(&|t| with_bias(identity(t, selective_scan), t), &case.leaves(Kind::Float));
        assert!(all.iter().all(|t| t.isfinite().all().int64_value(&[]) == 1), "{}", case.what);
    }
}

#[test]
fn large_step_sizes_pass_softplus() {
    let mut case = case(1, 20, 3, 2);
    case.inputs[1].1 *= 60.;
    case.check_f64(&fast(None), &plain(None));
    case.check_rounding(Kind::Float, &fast(None), &plain(None));
}

#[test]
fn no_tokens_hand_the_state_through() {
    let t = case(2, 0, 3, 2).leaves(Kind::Float);
    let out = selective_scan(&args(&t, None)).unwrap();
    assert_eq!(out.y_ble.size(), [2, 0, 3]);
    assert!(same_bits(&out.final_state_ben, &t[8]));
}

#[test]
fn errors_name_the_argument() {
    let t = case(2, 4, 6, 3).leaves(Kind::Float);
    let message = |change: &dyn Fn(&mut Vec<Tensor>)| {
        let mut t: Vec<Tensor> = t.iter().map(Tensor::shallow_clone).collect();
        change(&mut t);
        selective_scan(&args(&t, None)).unwrap_err().to_string()
    };
    assert_eq!(
        message(&|t| t[3] = t[3].narrow(2, 0, 2)),
        "selective_scan: b_bln has shape [2, 4, 2], expected [2, 4, 3]"
    );
    assert_eq!(message(&|t| t[2] = t[2].to_kind(Kind::BFloat16)), "selective_scan: a_en is BFloat16, expected Float");
    assert!(message(&|t| t[0] = t[0].to_kind(Kind::Int64)).contains("x_ble is Int64"));
    assert!(message(&|t| t[0] = t[0].select(0, 0)).contains("[batch, seq_len, d_inner]"));
    assert!(message(&|t| t[8] = t[8].narrow(0, 0, 1)).contains("initial_state_ben"));
    assert!(message(&|t| t[6] = t[6].to_kind(Kind::Double)).contains("z_ble is Double, expected Float"));
    let not_a_mask = Tensor::zeros([2, 4], (Kind::Float, Device::Cpu));
    let wrong = SelectiveScan { reset_bl: Some(&not_a_mask), ..args(&t, None) };
    assert!(selective_scan(&wrong).unwrap_err().to_string().contains("reset_bl is Float, expected Bool"));
    let no_states = message(&|t| [2, 3, 4, 8].into_iter().for_each(|i| t[i] = t[i].narrow(-1, 0, 0)));
    assert_eq!(no_states, "selective_scan: d_state is 0, expected at least 1");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn random_shapes_equal_the_reference(
        batch in 1i64..4, seq_len in 1i64..40, d_inner in 1i64..70, d_state in 1i64..20, every in 1i64..40,
    ) {
        let reset_bl = resets(batch, seq_len, every);
        case(batch, seq_len, d_inner, d_state).check_f64(&fast(Some(&reset_bl)), &plain(Some(&reset_bl)));
    }
}
