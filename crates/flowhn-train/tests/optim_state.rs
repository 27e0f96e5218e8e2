//! AdamW's state in fewer bytes, against its definition and against fp32.

use flowhn_nn::{Decay, Param, Weight};
use flowhn_torch::cpu;
use flowhn_torch::testing::{noise, same_bits};
use flowhn_train::optim::{AdamW, AdamWOptions, StateType};
use half::bf16;
use tch::{Device, Kind, Tensor};

const SMALLER: [StateType; 2] = [StateType::Bf16, StateType::Int8];

fn options(state: StateType) -> AdamWOptions {
    AdamWOptions { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip_norm: 0., state }
}

/// A parameter alone with its optimiser.
struct One {
    weight: Tensor,
    optimizer: AdamW,
}

impl One {
    fn new(values: &Tensor, options: AdamWOptions) -> Self {
        let weight = values.to_kind(Kind::Float).copy().set_requires_grad(true);
        let param = Param { name: "w".to_owned(), weight: Weight::new(weight.shallow_clone()), decay: Decay::Yes };
        Self { weight, optimizer: AdamW::new(vec![param], options).unwrap() }
    }

    fn step(&mut self, grad: &Tensor, lr: f64) {
        self.optimizer.zero_grad().unwrap();
        (&self.weight * grad).sum(Kind::Float).backward();
        let _norm = self.optimizer.step(lr).unwrap();
    }

    fn state(&self, name: &str) -> Tensor {
        let state = self.optimizer.state();
        state.into_iter().find(|(own, _)| own == name).unwrap_or_else(|| panic!("{name}")).1
    }

    /// A mean as it was kept, by the maps of the definition.
    fn mean(&self, name: &str) -> Vec<f64> {
        let kept = self.state(&format!("{name}.w"));
        match kept.kind() {
            Kind::Uint8 => {
                let map = dynamic_map(name == "exp_avg");
                let absmax = self.state(&format!("{name}_absmax.w"));
                let absmax = cpu::slice::<f32>(&absmax).unwrap();
                let codes = cpu::slice::<u8>(&kept).unwrap().iter().enumerate();
                codes.map(|(i, &code)| map[usize::from(code)] * f64::from(absmax[i / 256])).collect()
            }
            _ => doubles(&kept),
        }
    }
}

fn doubles(tensor: &Tensor) -> Vec<f64> {
    tensor.to_kind(Kind::Double).view(-1).try_into().unwrap()
}

fn gradient(n: i64, step: i64) -> Tensor {
    // Cubes have small values among large ones.
    noise(&[n], 31 + step).pow_tensor_scalar(3).to_kind(Kind::Float)
}

/// The dynamic map as it is made in the implementation that accompanies the paper: seven decades from the lowest on, each the middles of
/// twice as many parts of 0.1..1 as the one before, with signs or without; and 0 and 1.
fn dynamic_map(signed: bool) -> Vec<f64> {
    let mut map = vec![0., 1.];
    for i in 0..7 {
        let n_parts = if signed { 1 << i } else { 2 << i };
        let bounds: Vec<f64> = (0..=n_parts).map(|k| 0.1 + 0.9 * f64::from(k) / f64::from(n_parts)).collect();
        for pair in bounds.windows(2) {
            let value = 10f64.powi(i - 6) * (pair[0] + pair[1]) / 2.;
            map.push(value);
            if signed {
                map.push(-value);
            }
        }
    }
    map.sort_by(f64::total_cmp);
    assert_eq!(map.len(), 256);
    map
}

/// Distances to the nearest entry and to that of a code.
fn distances(map: &[f64], x: f64, code: u8) -> (f64, f64) {
    let nearest = map.iter().map(|entry| (entry - x).abs()).fold(f64::INFINITY, f64::min);
    (nearest, (map[usize::from(code)] - x).abs())
}

#[test]
fn codes_are_the_nearest_of_the_papers_map() {
    // Whole blocks, a partial one, and decades far apart in one block.
    let n = 256 * 17 + 77;
    let mut one = One::new(&noise(&[n], 1), options(StateType::Int8));
    for step in 1..=6 {
        let (m, v) = (one.mean("exp_avg"), one.mean("exp_avg_sq"));
        let grad = gradient(n, step);
        let before = doubles(&one.weight);
        one.step(&grad, 0.01);
        let exact: Vec<(f64, f64)> = doubles(&grad)
            .iter()
            .zip(m.iter().zip(&v))
            .map(|(g, (m, v))| (0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g))
            .collect();
        let (scale1, scale2) = (1. - 0.9f64.powi(step as i32), 1. - 0.95f64.powi(step as i32));
        for (i, (before, after)) in before.iter().zip(doubles(&one.weight)).enumerate() {
            let (m, v) = exact[i];
            let want = before * (1. - 0.01 * 0.1) - 0.01 * (m / scale1) / ((v / scale2).sqrt() + 1e-8);
            assert!((after - want).abs() < 1e-6, "step {step}: weight {i} is {after}, expected {want}");
        }
        for (name, values) in [
            ("exp_avg", exact.iter().map(|pair| pair.0).collect::<Vec<_>>()),
            ("exp_avg_sq", exact.iter().map(|pair| pair.1).collect()),
        ] {
            let map = dynamic_map(name == "exp_avg");
            let (codes, absmax) = (one.state(&format!("{name}.w")), one.state(&format!("{name}_absmax.w")));
            let (codes, absmax) = (cpu::slice::<u8>(&codes).unwrap(), cpu::slice::<f32>(&absmax).unwrap());
            assert_eq!((codes.len(), absmax.len()), (n as usize, 18));
            for (block, codes) in codes.chunks(256).enumerate() {
                let values = &values[256 * block..][..codes.len()];
                let largest = values.iter().fold(0f64, |largest, x| largest.max(x.abs()));
                assert!((f64::from(absmax[block]) / largest - 1.).abs() < 1e-6, "{name}: block {block}");
                for (&x, &code) in values.iter().zip(codes) {
                    let (nearest, got) = distances(&map, x / largest, code);
                    // Of two that are equally near up to rounding, either will do; and a mean square above 0 stays there.
                    let kept_above_zero = name == "exp_avg_sq" && x > 0. && code == 1 && x / largest < map[1];
                    assert!(got <= nearest + 1e-6 * (x / largest).abs() || kept_above_zero, "{name}: {x} as {code}");
                    assert!(name == "exp_avg" || code > 0 || x == 0., "{x} became 0");
                }
            }
        }
    }
}

#[test]
fn small_tensors_keep_fp32_beside_codes_and_bytes_are_as_promised() {
    let bytes = |n: i64, state| -> u64 {
        let one = One::new(&noise(&[n], 1), options(state));
        let kept = one.optimizer.state().into_iter().filter(|(name, _)| name != "step");
        kept.map(|(_, tensor)| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64).sum()
    };
    for state in [StateType::Fp32, StateType::Bf16, StateType::Int8] {
        assert_eq!(bytes(10_000, state), state.n_bytes(10_000), "{state}");
    }
    assert_eq!(StateType::Int8.n_bytes(10_000), 2 * 10_000 + 2 * 4 * 40);
    assert_eq!(bytes(4095, StateType::Int8), 8 * 4095);
    assert_eq!(bytes(4096, StateType::Int8), 2 * (4096 + 4 * 16));
    // As with fp32, then, to the last digits.
    let run = |state| {
        let mut one = One::new(&noise(&[4095], 1), options(state));
        (1..5).for_each(|step| one.step(&gradient(4095, step), 0.01));
        one.weight.detach()
    };
    let error = (run(StateType::Int8) - run(StateType::Fp32)).abs().max().double_value(&[]);
    assert!(error < 1e-6, "{error}");
}

#[test]
fn bf16_is_one_of_the_two_neighbours_and_right_in_the_mean() {
    let n = 40_000i64;
    let mut one = One::new(&noise(&[n], 1), options(StateType::Bf16));
    // 1.003 and its mean square lie between two bf16; all elements are the same but for the random bits.
    one.step(&Tensor::full([n], 10.03, (Kind::Float, Device::Cpu)), 0.01);
    for (name, want) in [("exp_avg", 0.1 * f64::from(10.03f32)), ("exp_avg_sq", 0.05 * f64::from(10.03f32).powi(2))] {
        let kept = one.mean(name);
        let below = f64::from(bf16::from_bits((want as f32).to_bits().checked_shr(16).unwrap_or(0) as u16).to_f32());
        let unit = below * 2f64.powi(-7);
        assert!(kept.iter().all(|x| *x == below || (*x > below && *x <= below + unit)), "{name}");
        let mean = kept.iter().sum::<f64>() / n as f64;
        // Four standard deviations of the mean of as many roundings, each of at most half a unit.
        let allowed = 4. * 0.5 * unit / (n as f64).sqrt();
        assert!((mean - want).abs() < allowed && allowed < 0.02 * unit, "{name}: {mean}, expected {want}");
        assert!(kept.contains(&below) && kept.iter().any(|x| *x > below), "{name}");
    }
}

/// A mean square whose gradient has become 0 shrinks by `beta2` in an update, which is far below half a unit of bf16 where `beta2` is near 1.
#[test]
fn mean_squares_shrink_however_slowly() {
    let n = 8192i64;
    for (beta2, steps) in [(0.95, 60), (0.999, 700)] {
        // Rounding to the nearest would keep it for ever.
        let stuck = bf16::from_f32(1.23).to_f32();
        let nearest = bf16::from_f32(stuck * beta2 as f32).to_f32();
        assert_eq!(nearest == stuck, beta2 > 0.99, "{beta2}");
        for state in SMALLER {
            let mut one = One::new(&noise(&[n], 1), AdamWOptions { beta2, ..options(state) });
            one.step(&Tensor::full([n], 3., (Kind::Float, Device::Cpu)), 0.);
            let zeros = Tensor::zeros([n], (Kind::Float, Device::Cpu));
            (1..steps).for_each(|_| one.step(&zeros, 0.));
            let want = 9. * (1. - beta2) * beta2.powi(steps - 1);
            let kept = one.mean("exp_avg_sq");
            let mean = kept.iter().sum::<f64>() / n as f64;
            assert!((mean / want - 1.).abs() < 0.01, "{state}, beta2 {beta2}: {mean:e}, expected {want:e}");
        }
    }
}

/// Least squares with noisy gradients of very different sizes: what the loss comes to, and that of fp32.
#[test]
fn a_problem_converges_as_with_fp32() {
    const N: i64 = 6000;
    let target = noise(&[N], 5);
    // Curvatures over two decades, some coordinates without a gradient most of the time.
    let curvature = (noise(&[N], 6) * 2.3).exp();
    let loss = |weight: &Tensor| ((weight.to_kind(Kind::Double) - &target).square() * &curvature).mean(Kind::Double);
    for beta2 in [0.95, 0.999] {
        let run = |state| {
            let options = AdamWOptions { beta2, weight_decay: 0., clip_norm: 100., ..options(state) };
            let mut one = One::new(&Tensor::zeros([N], (Kind::Double, Device::Cpu)), options);
            for step in 0..300 {
                let is_seen = (Tensor::arange(N, (Kind::Int64, Device::Cpu)) + step).fmod(3).not_equal(0);
                let slope = (one.weight.detach() - &target) * &curvature + noise(&[N], 100 + step) * 0.1;
                one.step(
                    &(slope * is_seen.to_kind(Kind::Double)).to_kind(Kind::Float),
                    0.02 * (1. - step as f64 / 300.),
                );
            }
            loss(&one.weight.detach()).double_value(&[])
        };
        let start = loss(&Tensor::zeros([N], (Kind::Double, Device::Cpu))).double_value(&[]);
        let want = run(StateType::Fp32);
        assert!(want < 0.01 * start, "{want} of {start}");
        for state in SMALLER {
            let got = run(state);
            assert!(
                got < want + 0.005 * start,
                "{state}, beta2 {beta2}: {got:.2e}, fp32 {want:.2e}, start {start:.2e}"
            );
        }
    }
}

/// Rows that are seen once and never again, as in an embedding: small mean squares beside large ones must not turn into steps that only
/// epsilon bounds.
#[test]
fn elements_seen_once_take_no_wild_steps() {
    let n = 8192i64;
    let run = |state| {
        let mut one = One::new(
            &Tensor::zeros([n], (Kind::Float, Device::Cpu)),
            AdamWOptions { weight_decay: 0., ..options(state) },
        );
        one.step(&(noise(&[n], 3).pow_tensor_scalar(9) * 10.).to_kind(Kind::Float), 0.01);
        (0..50).for_each(|_| one.step(&Tensor::zeros([n], (Kind::Float, Device::Cpu)), 0.01));
        one.weight.detach().abs().max().double_value(&[])
    };
    let want = run(StateType::Fp32);
    for state in SMALLER {
        let got = run(state);
        assert!(got < 3. * want, "{state}: {got}, fp32 {want}");
    }
}

#[test]
fn extremes_stay_themselves() {
    let n = 5000i64;
    let with = |value: f64| {
        let grad = Tensor::full([n], 1e-3, (Kind::Float, Device::Cpu));
        let _ = grad.narrow(0, 300, 1).fill_(value);
        grad
    };
    let finite = |x: &[f64]| x.iter().filter(|x| x.is_finite()).count();
    for state in SMALLER {
        for value in [0., -0., 1e-45, -1e-39, 1e-20, 1e15, -1e18] {
            let mut one = One::new(&noise(&[n], 1), options(state));
            (0..3).for_each(|_| one.step(&with(value), 0.01));
            let kept = [one.mean("exp_avg"), one.mean("exp_avg_sq"), doubles(&one.weight)];
            assert!(kept.iter().all(|values| finite(values) == n as usize), "{state}, {value}");
            assert!(kept[1].iter().all(|v| *v >= 0.), "{state}, {value}");
            assert!(value == 0. || kept[0][300] * value >= 0., "{state}, {value}: {}", kept[0][300]);
        }
        // All zeros stay zeros.
        let mut one = One::new(&noise(&[n], 1), AdamWOptions { weight_decay: 0., ..options(state) });
        let before = one.weight.copy();
        one.step(&Tensor::zeros([n], (Kind::Float, Device::Cpu)), 0.01);
        assert!(
            one.weight.equal(&before) && one.mean("exp_avg").iter().chain(&one.mean("exp_avg_sq")).all(|x| *x == 0.)
        );
        // What is not finite stays visible, in the weight and in the means, and reaches no further than a block.
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut one = One::new(&noise(&[n], 1), options(state));
            one.step(&with(value), 0.01);
            let block = if state == StateType::Int8 { 256 } else { 1 };
            let weights = doubles(&one.weight);
            assert!(!weights[300].is_finite() && finite(&weights) == n as usize - 1, "{state}, {value}");
            for name in ["exp_avg", "exp_avg_sq"] {
                let kept = one.mean(name);
                assert!(!kept[300].is_finite(), "{state}, {value}: {name} is {}", kept[300]);
                assert_eq!(finite(&kept), n as usize - block, "{state}, {value}: {name}");
            }
        }
    }
}

#[test]
fn a_saved_state_goes_on_bit_for_bit_and_only_in_its_own_type() {
    let n = 5003i64;
    let begin = |state| One::new(&noise(&[n], 1), options(state));
    for state in SMALLER {
        let mut whole = begin(state);
        (0..8).for_each(|step| whole.step(&gradient(n, step), 0.01));
        let mut first = begin(state);
        (0..5).for_each(|step| first.step(&gradient(n, step), 0.01));
        let mut second = One::new(&first.weight.detach(), options(state));
        second.optimizer.load_state(&first.optimizer.state()).unwrap();
        (5..8).for_each(|step| second.step(&gradient(n, step), 0.01));
        assert!(whole.weight.equal(&second.weight), "{state}");
        let (a, b) = (whole.optimizer.state(), second.optimizer.state());
        assert!(a.len() == b.len() && a.iter().zip(&b).all(|((n, a), (m, b))| n == m && same_bits(a, b)), "{state}");
        for other in [StateType::Fp32, StateType::Bf16, StateType::Int8].into_iter().filter(|other| *other != state) {
            let error = begin(other).optimizer.load_state(&a).unwrap_err();
            assert!(error.contains("exp_avg.w is ") && error.contains("expected"), "{state} into {other}: {error}");
        }
    }
}

#[test]
fn parameters_in_double_precision_are_refused_beside_them() {
    let weight = noise(&[5], 1).set_requires_grad(true);
    let param = Param { name: "w".to_owned(), weight: Weight::new(weight), decay: Decay::Yes };
    let error = AdamW::new(vec![param], options(StateType::Int8)).unwrap_err().to_string();
    assert!(error.contains("Double") && error.contains("int8"), "{error}");
}
