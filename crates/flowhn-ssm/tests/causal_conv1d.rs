//! The causal convolution against its plain reference.

mod common;

use common::{Case, normal, resets, results, same_bits, strided, widened, with_threads};
use flowhn_ssm::{
    Activation, CausalConv1d, CausalConv1dOutput, CausalConv1dStep, Result, causal_conv1d, causal_conv1d_step,
    reference,
};
use flowhn_torch::testing::assert_close;
use proptest::prelude::*;
use tch::{Kind, Tensor};

fn case(batch: i64, seq_len: i64, channels: i64, d_conv: i64) -> Case {
    Case {
        what: format!("{batch} x {seq_len} x {channels}, {d_conv} taps"),
        inputs: vec![
            ("x", normal(1, &[batch, seq_len, channels])),
            ("weight", normal(2, &[channels, d_conv])),
            ("bias", normal(3, &[channels])),
            ("initial_state", normal(4, &[batch, d_conv - 1, channels])),
        ],
        params: &["weight", "bias", "initial_state"],
    }
}

fn args<'a>(t: &'a [Tensor], reset_bl: Option<&'a Tensor>) -> CausalConv1d<'a> {
    CausalConv1d { bias_e: Some(&t[2]), initial_state_bje: Some(&t[3]), reset_bl, ..CausalConv1d::new(&t[0], &t[1]) }
}

fn pair(out: CausalConv1dOutput) -> [Tensor; 2] {
    [out.y_ble, out.final_state_bje]
}

fn fast<'a>(reset_bl: Option<&'a Tensor>) -> impl Fn(&[Tensor]) -> Result<[Tensor; 2]> + 'a {
    move |t| causal_conv1d(&args(t, reset_bl)).map(pair)
}

fn plain<'a>(reset_bl: Option<&'a Tensor>) -> impl Fn(&[Tensor]) -> Result<[Tensor; 2]> + 'a {
    move |t| reference::causal_conv1d(&args(t, reset_bl)).map(pair)
}

#[test]
fn gradients_match_finite_differences() {
    for d_conv in [1, 2, 4] {
        let case = case(2, 7, 3, d_conv);
        case.check_gradients(&fast(None));
        case.check_gradients(&fast(Some(&resets(2, 7, 3))));
    }
}

#[test]
fn without_the_optional_arguments_gradients_match_too() {
    let case = Case { inputs: case(2, 6, 3, 4).inputs.into_iter().take(2).collect(), ..case(1, 1, 1, 1) };
    for activation in [Activation::None, Activation::Silu] {
        case.check_gradients(&|t| {
            causal_conv1d(&CausalConv1d { activation, ..CausalConv1d::new(&t[0], &t[1]) }).map(pair)
        });
    }
}

#[test]
fn f64_equals_the_reference() {
    for (batch, seq_len, channels) in [(1, 1, 1), (2, 2, 3), (1, 3, 65), (2, 64, 5), (3, 65, 64), (1, 131, 100)] {
        for d_conv in [1, 2, 3, 4, 7] {
            let case = case(batch, seq_len, channels, d_conv);
            case.check_f64(&fast(None), &plain(None));
            for every in [1, 5, 23] {
                let reset_bl = resets(batch, seq_len, every);
                case.check_f64(&fast(Some(&reset_bl)), &plain(Some(&reset_bl)));
            }
        }
    }
}

#[test]
fn the_reference_agrees_with_the_framework() {
    let t = case(2, 11, 3, 4).leaves(Kind::Double);
    let want = t[0].transpose(1, 2).f_conv1d(&t[1].unsqueeze(1), Some(&t[2]), 1, 3, 1, 3).unwrap();
    let want = want.narrow(2, 0, 11).silu().transpose(1, 2);
    let got = reference::causal_conv1d(&CausalConv1d { initial_state_bje: None, ..args(&t, None) }).unwrap().y_ble;
    assert_close("y", &got, &want, 1e-14);
}

#[test]
fn strided_inputs_equal_contiguous_ones() {
    let case = case(2, 9, 6, 4);
    for layout in [strided, widened] {
        let op = |t: &[Tensor]| {
            let t = [layout(&t[0]), layout(&t[1]), t[2].shallow_clone(), layout(&t[3])];
            assert!(!t[0].is_contiguous() && !t[1].is_contiguous() && !t[3].is_contiguous());
            causal_conv1d(&args(&t, None)).map(pair)
        };
        case.check_f64(&op, &plain(None));
    }
}

#[test]
fn f32_and_bf16_are_as_exact_as_the_plain_form() {
    for case in [case(2, 37, 40, 4), case(1, 130, 96, 4), case(3, 1, 7, 3)] {
        for kind in [Kind::Float, Kind::BFloat16] {
            case.check_rounding(kind, &fast(None), &plain(None));
        }
    }
}

#[test]
fn weights_may_be_bf16_too() {
    let case = Case { params: &["initial_state"], ..case(2, 9, 6, 4) };
    case.check_rounding(Kind::BFloat16, &fast(None), &plain(None));
}

#[test]
fn pieces_equal_the_whole() {
    let t = case(2, 12, 5, 4).leaves(Kind::Double);
    let reset_bl = resets(2, 12, 5);
    let whole = causal_conv1d(&args(&t, Some(&reset_bl))).unwrap();
    for cut in 1..12 {
        let run = |start: i64, len: i64, state: &Tensor| {
            let t = [t[0].narrow(1, start, len), t[1].shallow_clone(), t[2].shallow_clone(), state.shallow_clone()];
            causal_conv1d(&args(&t, Some(&reset_bl.narrow(1, start, len)))).unwrap()
        };
        let first = run(0, cut, &t[3]);
        let second = run(cut, 12 - cut, &first.final_state_bje);
        assert!(same_bits(&Tensor::cat(&[first.y_ble, second.y_ble], 1), &whole.y_ble), "cut at {cut}");
        assert!(same_bits(&second.final_state_bje, &whole.final_state_bje), "cut at {cut}");
    }
}

#[test]
fn steps_equal_the_whole() {
    let t = case(2, 9, 5, 4).leaves(Kind::Float);
    let reset_bl = resets(2, 9, 4);
    let whole = causal_conv1d(&args(&t, Some(&reset_bl))).unwrap();
    let _guard = tch::no_grad_guard();
    let mut state_bje = t[3].copy();
    for token in 0..9 {
        let y_be = causal_conv1d_step(CausalConv1dStep {
            x_be: &t[0].select(1, token),
            weight_ek: &t[1],
            bias_e: Some(&t[2]),
            activation: Activation::Silu,
            state_bje: &mut state_bje,
            reset_b: Some(&reset_bl.select(1, token)),
        })
        .unwrap();
        assert!(same_bits(&y_be, &whole.y_ble.select(1, token)), "token {token}");
    }
    assert!(same_bits(&state_bje, &whole.final_state_bje));
}

#[test]
fn a_token_leaves_those_before_it_alone() {
    let t = case(1, 70, 33, 4).leaves(Kind::Float);
    let before = causal_conv1d(&args(&t, None)).unwrap().y_ble;
    for token in [0, 1, 63, 64, 69] {
        let mut changed: Vec<Tensor> = t.iter().map(|t| t.detach().copy()).collect();
        let _ = changed[0].select(1, token).fill_(f64::NAN);
        let after = causal_conv1d(&args(&changed, None)).unwrap().y_ble;
        assert!(same_bits(&after.narrow(1, 0, token), &before.narrow(1, 0, token)), "token {token}");
        assert!(!same_bits(&after, &before));
        changed.clear();
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let leaves = || case(2, 150, 200, 4).leaves(Kind::Float);
    let run = |n_threads| with_threads(n_threads, || results(&fast(None), &leaves()));
    for (one, three) in run(1).iter().zip(&run(3)) {
        assert!(same_bits(one, three));
    }
}

#[test]
fn no_tokens_hand_the_state_through() {
    let t = case(2, 0, 3, 4).leaves(Kind::Float);
    let out = causal_conv1d(&args(&t, None)).unwrap();
    assert_eq!(out.y_ble.size(), [2, 0, 3]);
    assert!(same_bits(&out.final_state_bje, &t[3]));
}

#[test]
fn errors_name_the_argument() {
    let t = case(2, 4, 6, 3).leaves(Kind::Float);
    let short = t[3].narrow(1, 0, 1);
    let wrong = CausalConv1d { initial_state_bje: Some(&short), ..args(&t, None) };
    assert_eq!(
        causal_conv1d(&wrong).unwrap_err().to_string(),
        "causal_conv1d: initial_state_bje has shape [2, 1, 6], expected [2, 2, 6]"
    );
    let no_taps = t[1].narrow(1, 0, 0);
    let wrong = CausalConv1d { weight_ek: &no_taps, ..args(&t, None) };
    assert!(causal_conv1d(&wrong).unwrap_err().to_string().contains("weight_ek has no taps"));
}

#[test]
fn a_step_names_what_keeps_it_from_writing() {
    let t = case(2, 1, 6, 3).leaves(Kind::Float);
    let step = |x_be: &Tensor, weight_ek: &Tensor, state_bje: &mut Tensor| {
        let args =
            CausalConv1dStep { x_be, weight_ek, bias_e: None, activation: Activation::None, state_bje, reset_b: None };
        causal_conv1d_step(args).map_or_else(|error| error.to_string(), |_| String::new())
    };
    let (x, weight) = (t[0].detach().squeeze_dim(1), t[1].detach());
    let mut state = t[3].detach().copy();
    let recorded = step(&x, &t[1], &mut state);
    assert!(recorded.contains("the state is written in place, which has no gradient"), "{recorded}");
    assert!(same_bits(&state, &t[3]));
    tch::no_grad(|| assert_eq!(step(&x, &t[1], &mut state), ""));
    let shared = step(&state.select(1, 0), &weight, &mut state);
    assert!(shared.contains("the state is written in place, but shares memory with another argument"), "{shared}");
    let strided = step(&x, &weight, &mut state.transpose(0, 1).contiguous().transpose(0, 1));
    assert!(strided.contains("the state has strides [6, 12, 1], but is written in place"), "{strided}");
    let short = step(&x, &weight, &mut state.narrow(1, 0, 1));
    assert!(short.contains("initial_state_bje has shape [2, 1, 6], expected [2, 2, 6]"), "{short}");
    let scalar = step(&Tensor::from(1f32), &weight, &mut state);
    assert!(scalar.contains("Dimension out of range"), "{scalar}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn random_shapes_equal_the_reference(
        batch in 1i64..4, seq_len in 1i64..150, channels in 1i64..70, d_conv in 1i64..7, every in 1i64..40,
    ) {
        let reset_bl = resets(batch, seq_len, every);
        case(batch, seq_len, channels, d_conv).check_f64(&fast(Some(&reset_bl)), &plain(Some(&reset_bl)));
    }
}
