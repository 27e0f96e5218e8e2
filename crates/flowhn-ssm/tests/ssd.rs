//! SSD against its plain references.

mod common;

use common::{Case, normal, resets, results, same_bits, strided, widened, with_threads};
use flowhn_ssm::{DtActivation, Result, Ssd, SsdOutput, SsdStep, reference, ssd, ssd_step};
use flowhn_torch::testing::assert_close;
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

const PARAMS: [&str; 4] = ["a", "d", "dt_bias", "initial_state"];

/// Sizes: batch, seq_len, n_heads, d_head, n_groups, d_state.
fn case([b, l, h, p, g, n]: [i64; 6]) -> Case {
    Case {
        what: format!("{b} x {l} x {h} x {p}, {g} groups, d_state {n}"),
        inputs: vec![
            ("x", normal(1, &[b, l, h, p])),
            ("dt", normal(2, &[b, l, h])),
            ("a", -normal(3, &[h]).exp()),
            ("b", normal(4, &[b, l, g, n])),
            ("c", normal(5, &[b, l, g, n])),
            ("d", normal(6, &[h])),
            ("dt_bias", normal(8, &[h]) - 1.),
            ("initial_state", normal(9, &[b, h, p, n])),
        ],
        params: &PARAMS,
    }
}

fn args<'a>(t: &'a [Tensor], reset_bl: Option<&'a Tensor>, chunk_len: usize) -> Ssd<'a> {
    Ssd {
        d_h: Some(&t[5]),
        dt_bias_h: Some(&t[6]),
        initial_state_bhpn: Some(&t[7]),
        reset_bl,
        chunk_len,
        ..Ssd::new(&t[0], &t[1], &t[2], &t[3], &t[4])
    }
}

fn pair(out: SsdOutput) -> [Tensor; 2] {
    [out.y_blhp, out.final_state_bhpn]
}

fn fast<'a>(reset_bl: Option<&'a Tensor>, chunk_len: usize) -> impl Fn(&[Tensor]) -> Result<[Tensor; 2]> + 'a {
    move |t| ssd(&args(t, reset_bl, chunk_len)).map(pair)
}

fn plain<'a>(reset_bl: Option<&'a Tensor>) -> impl Fn(&[Tensor]) -> Result<[Tensor; 2]> + 'a {
    move |t| reference::ssd(&args(t, reset_bl, 1)).map(pair)
}

fn plain_chunked<'a>(reset_bl: Option<&'a Tensor>, chunk_len: usize) -> impl Fn(&[Tensor]) -> Result<[Tensor; 2]> + 'a {
    move |t| reference::ssd_chunked(&args(t, reset_bl, chunk_len)).map(pair)
}

#[test]
fn gradients_match_finite_differences() {
    for (sizes, chunk_len) in [([2, 11, 2, 3, 1, 2], 4), ([1, 9, 4, 2, 2, 3], 64)] {
        let case = case(sizes);
        case.check_gradients(&fast(None, chunk_len));
        case.check_gradients(&fast(Some(&resets(sizes[0], sizes[1], 4)), chunk_len));
    }
}

#[test]
fn without_the_optional_arguments_gradients_match_too() {
    let case = Case { inputs: case([1, 7, 3, 2, 1, 2]).inputs.into_iter().take(5).collect(), ..case([1; 6]) };
    for dt_activation in [DtActivation::Softplus, DtActivation::Identity] {
        case.check_gradients(&|t| {
            let args = Ssd::new(&t[0], &t[1], &t[2], &t[3], &t[4]);
            ssd(&Ssd { dt_activation, chunk_len: 3, ..args }).map(pair)
        });
    }
}

#[test]
fn f64_equals_both_references() {
    let shapes = [
        [1, 1, 1, 1, 1, 1],
        [2, 2, 3, 5, 3, 2],
        [1, 16, 4, 8, 2, 16],
        [2, 17, 2, 9, 1, 7],
        [1, 97, 6, 16, 2, 5],
        [1, 65, 1, 64, 1, 33],
    ];
    for sizes in shapes {
        let case = case(sizes);
        for reset_bl in [None, Some(resets(sizes[0], sizes[1], 1)), Some(resets(sizes[0], sizes[1], 11))] {
            let reset_bl = reset_bl.as_ref();
            for chunk_len in [1, 7, 16, 64, 200] {
                case.check_f64(&fast(reset_bl, chunk_len), &plain(reset_bl));
            }
            case.check_f64(&plain_chunked(reset_bl, 16), &plain(reset_bl));
        }
    }
}

#[test]
fn strided_inputs_equal_contiguous_ones() {
    let case = case([2, 13, 4, 6, 2, 5]);
    for layout in [strided, widened] {
        let op = |t: &[Tensor]| {
            let mut t: Vec<Tensor> = t.iter().map(Tensor::shallow_clone).collect();
            for i in [0, 1, 3, 4] {
                t[i] = layout(&t[i]);
                assert!(!t[i].is_contiguous());
            }
            ssd(&args(&t, None, 5)).map(pair)
        };
        case.check_f64(&op, &plain(None));
    }
}

#[test]
fn f32_and_bf16_are_as_exact_as_the_plain_form() {
    for sizes in [[2, 37, 4, 16, 2, 16], [1, 130, 2, 64, 1, 32], [3, 1, 2, 4, 1, 8]] {
        let case = case(sizes);
        for reset_bl in [None, Some(resets(sizes[0], sizes[1], 23))] {
            let reset_bl = reset_bl.as_ref();
            for kind in [Kind::Float, Kind::BFloat16] {
                case.check_rounding(kind, &fast(reset_bl, 64), &plain_chunked(reset_bl, 64));
            }
        }
    }
}

#[test]
fn scanning_in_pieces_equals_scanning_at_once() {
    let t = case([2, 41, 4, 6, 2, 5]).leaves(Kind::Double);
    let reset_bl = resets(2, 41, 13);
    let whole = ssd(&args(&t, Some(&reset_bl), 16)).unwrap();
    for cut in [1, 15, 16, 17, 40] {
        let run = |start: i64, len: i64, state: &Tensor| {
            let mut t: Vec<Tensor> = t.iter().map(Tensor::shallow_clone).collect();
            for i in [0, 1, 3, 4] {
                t[i] = t[i].narrow(1, start, len);
            }
            t[7] = state.shallow_clone();
            ssd(&args(&t, Some(&reset_bl.narrow(1, start, len)), 16)).unwrap()
        };
        let first = run(0, cut, &t[7]);
        let second = run(cut, 41 - cut, &first.final_state_bhpn);
        assert_close("y", &Tensor::cat(&[first.y_blhp, second.y_blhp], 1), &whole.y_blhp, 1e-13);
        assert_close("state", &second.final_state_bhpn, &whole.final_state_bhpn, 1e-13);
    }
}

#[test]
fn steps_equal_the_scan() {
    let t = case([2, 9, 4, 6, 2, 5]).leaves(Kind::Float);
    let reset_bl = resets(2, 9, 4);
    let whole = ssd(&args(&t, Some(&reset_bl), 64)).unwrap();
    let _guard = tch::no_grad_guard();
    let mut state_bhpn = t[7].copy();
    for token in 0..9 {
        let at = |i: usize| t[i].select(1, token);
        let y_bhp = ssd_step(SsdStep {
            x_bhp: &at(0),
            dt_bh: &at(1),
            a_h: &t[2],
            b_bgn: &at(3),
            c_bgn: &at(4),
            d_h: Some(&t[5]),
            dt_bias_h: Some(&t[6]),
            dt_activation: DtActivation::Softplus,
            state_bhpn: &mut state_bhpn,
            reset_b: Some(&reset_bl.select(1, token)),
        })
        .unwrap();
        assert_close("y", &y_bhp, &whole.y_blhp.select(1, token), 1e-5);
    }
    assert_close("state", &state_bhpn, &whole.final_state_bhpn, 1e-5);
}

#[test]
fn a_token_leaves_those_before_it_alone() {
    let t = case([1, 40, 2, 16, 1, 8]).leaves(Kind::Float);
    let before = ssd(&args(&t, None, 16)).unwrap().y_blhp;
    for token in [0, 1, 15, 16, 39] {
        for i in [0, 1, 3, 4] {
            // Also by a value that is not finite: nothing may leak through products with zero.
            for value in [3., f64::NAN] {
                let mut changed: Vec<Tensor> = t.iter().map(Tensor::shallow_clone).collect();
                changed[i] = t[i].detach().copy();
                let _ = changed[i].select(1, token).fill_(value);
                let after = ssd(&args(&changed, None, 16)).unwrap().y_blhp;
                assert!(same_bits(&after.narrow(1, 0, token), &before.narrow(1, 0, token)), "input {i}, token {token}");
                assert!(!same_bits(&after, &before));
            }
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let leaves = || case([2, 70, 8, 16, 2, 16]).leaves(Kind::Float);
    let run = |n_threads| with_threads(n_threads, || results(&fast(None, 64), &leaves()));
    for (one, three) in run(1).iter().zip(&run(3)) {
        assert!(same_bits(one, three));
    }
}

#[test]
fn extreme_values_stay_finite_where_the_reference_does() {
    for (dt, a, x) in [(-60., -1., 1.), (-18., -1e-4, 1.), (50., -1e4, 1.), (50., -1e-4, 1e4), (-18., -1e4, 1e6)] {
        let mut case = case([1, 40, 2, 5, 1, 4]);
        case.what = format!("dt {dt}, a {a}, x {x}");
        case.inputs[0].1 *= x;
        case.inputs[1].1 = case.inputs[1].1.full_like(dt);
        case.inputs[2].1 = case.inputs[2].1.full_like(a);
        case.check_rounding(Kind::Float, &fast(None, 16), &plain(None));
        let all = results(&fast(None, 16), &case.leaves(Kind::Float));
        assert!(all.iter().all(|t| t.isfinite().all().int64_value(&[]) == 1), "{}", case.what);
    }
}

#[test]
fn a_small_decay_after_a_large_one_keeps_its_digits() {
    // Decays of e^-5e4 and e^-1e-3 in turns: differences of running totals would lose the small ones.
    let mut case = case([1, 24, 1, 4, 1, 3]);
    let odd = Tensor::arange(24, (Kind::Double, Device::Cpu)).remainder(12).eq(0).to_kind(Kind::Double);
    case.inputs[1].1 = (odd * 5e4 + 1e-3).view([1, 24, 1]);
    case.inputs[2].1 = case.inputs[2].1.full_like(-1.);
    case.inputs[6].1 = case.inputs[6].1.zeros_like();
    let identity = |t: &[Tensor]| ssd(&Ssd { dt_activation: DtActivation::Identity, ..args(t, None, 24) }).map(pair);
    let exact =
        |t: &[Tensor]| reference::ssd(&Ssd { dt_activation: DtActivation::Identity, ..args(t, None, 24) }).map(pair);
    case.check_rounding(Kind::Float, &identity, &exact);
}

#[test]
fn no_tokens_hand_the_state_through() {
    let t = case([2, 0, 2, 3, 1, 2]).leaves(Kind::Float);
    let out = ssd(&args(&t, None, 8)).unwrap();
    assert_eq!(out.y_blhp.size(), [2, 0, 2, 3]);
    assert!(same_bits(&out.final_state_bhpn, &t[7]));
}

#[test]
fn errors_name_the_argument() {
    let t = case([2, 4, 6, 3, 2, 5]).leaves(Kind::Float);
    let message = |change: &dyn Fn(&mut Vec<Tensor>), chunk_len| {
        let mut t: Vec<Tensor> = t.iter().map(Tensor::shallow_clone).collect();
        change(&mut t);
        ssd(&args(&t, None, chunk_len)).unwrap_err().to_string()
    };
    assert_eq!(message(&|t| t[1] = t[1].narrow(2, 0, 2), 4), "ssd: dt_blh has shape [2, 4, 2], expected [2, 4, 6]");
    assert_eq!(message(&|_| (), 0), "ssd: chunk_len is 0, expected a positive number of tokens");
    let four_groups = |t: &Tensor| Tensor::cat(&[t, t], 2);
    assert_eq!(
        message(&|t| (t[3], t[4]) = (four_groups(&t[3]), four_groups(&t[4])), 4),
        "ssd: b_blgn has 4 groups, which do not divide the 6 heads of x_blhp"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn random_shapes_equal_the_reference(
        batch in 1i64..3, seq_len in 1i64..40, heads_per_group in 1i64..4, n_groups in 1i64..3, d_head in 1i64..20,
        d_state in 1i64..20, every in 1i64..40, chunk_len in 1usize..50,
    ) {
        let reset_bl = resets(batch, seq_len, every);
        let case = case([batch, seq_len, heads_per_group * n_groups, d_head, n_groups, d_state]);
        case.check_f64(&fast(Some(&reset_bl), chunk_len), &plain(Some(&reset_bl)));
    }
}
