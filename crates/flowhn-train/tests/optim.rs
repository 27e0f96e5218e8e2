//! AdamW and clipping against the algorithm written out.

use flowhn_nn::{Decay, Param, Weight};
use flowhn_torch::testing::assert_close;
use flowhn_train::optim::{AdamW, AdamWOptions, StateType};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

const OPTIONS: AdamWOptions =
    AdamWOptions { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip_norm: 0.7, state: StateType::Fp32 };

fn leaf(name: &str, shape: &[i64], kind: Kind, decay: Decay) -> Param {
    let n: i64 = shape.iter().product();
    let phase = name.len() as f64;
    let values = (Tensor::arange(n, (Kind::Double, Device::Cpu)) * 0.37 + phase).sin().reshape(shape).to_kind(kind);
    Param { name: name.to_owned(), weight: Weight::new(values.set_requires_grad(true)), decay }
}

fn leaves(kind: Kind) -> Vec<Param> {
    vec![
        leaf("embed.weight", &[5, 3], kind, Decay::Yes),
        leaf("norm.weight", &[3], kind, Decay::No),
        leaf("head.weight", &[4, 3], kind, Decay::Yes),
    ]
}

/// A loss that meets every leaf and changes from step to step.
fn loss(leaves: &[Tensor], step: i64) -> Tensor {
    let x = (&leaves[0] * &leaves[1]).sin().matmul(&leaves[2].transpose(0, 1));
    // Every third gradient is small, so that it is not clipped.
    let size = if step % 3 == 0 { 0.01 } else { 1. };
    (x * (step as f64 * 0.1 + 1.)).cosh().mean(None) * size
}

/// Loshchilov and Hutter's algorithm 2 in f64, one element after the other, with clipping by the global norm.
struct Reference {
    weights: Vec<Tensor>,
    decay: Vec<f64>,
    m: Vec<Vec<f64>>,
    v: Vec<Vec<f64>>,
    step: i32,
}

impl Reference {
    fn new(leaves: &[Param]) -> Self {
        let zeros = || leaves.iter().map(|leaf| vec![0.; leaf.weight.master().numel()]).collect();
        Self {
            weights: leaves.iter().map(|leaf| leaf.weight.master().detach().to_kind(Kind::Double).copy()).collect(),
            decay: leaves.iter().map(|l| if l.decay == Decay::Yes { OPTIONS.weight_decay } else { 0. }).collect(),
            m: zeros(),
            v: zeros(),
            step: 0,
        }
    }

    /// Returns the norm before clipping.
    fn step(&mut self, grads: &[Tensor], lr: f64) -> f64 {
        let grads: Vec<Vec<f64>> = grads.iter().map(|grad| grad.contiguous().view(-1).try_into().unwrap()).collect();
        let norm = grads.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let clip = (OPTIONS.clip_norm / (norm + 1e-6)).min(1.);
        self.step += 1;
        let (c1, c2) = (1. - OPTIONS.beta1.powi(self.step), 1. - OPTIONS.beta2.powi(self.step));
        for (idx, grad) in grads.iter().enumerate() {
            let weight = &mut self.weights[idx];
            let mut w: Vec<f64> = weight.view(-1).try_into().unwrap();
            for (i, g) in grad.iter().map(|g| g * clip).enumerate() {
                let (m, v) = (&mut self.m[idx][i], &mut self.v[idx][i]);
                *m = OPTIONS.beta1 * *m + (1. - OPTIONS.beta1) * g;
                *v = OPTIONS.beta2 * *v + (1. - OPTIONS.beta2) * g * g;
                w[i] -= lr * self.decay[idx] * w[i];
                w[i] -= lr * (*m / c1) / ((*v / c2).sqrt() + OPTIONS.eps);
            }
            *weight = Tensor::from_slice(&w).reshape(weight.size());
        }
        norm
    }
}

fn gradients(weights: &[Tensor], step: i64) -> Vec<Tensor> {
    let weights: Vec<Tensor> = weights.iter().map(|w| w.detach().copy().set_requires_grad(true)).collect();
    Tensor::run_backward(&[loss(&weights, step)], &weights, false, false)
}

fn follows_the_reference(kind: Kind, tolerance: f64) {
    let made = leaves(kind);
    let mut reference = Reference::new(&made);
    let weights: Vec<Tensor> = made.iter().map(|leaf| leaf.weight.master().shallow_clone()).collect();
    let mut optimizer = AdamW::new(made, OPTIONS).unwrap();
    let mut clipped = 0;
    for step in 0..30 {
        let lr = 0.02 / (step + 1) as f64;
        optimizer.zero_grad().unwrap();
        loss(&weights, step).backward();
        let norm = optimizer.step(lr).unwrap().double_value(&[]);
        let want = reference.step(&gradients(&reference.weights, step), lr);
        assert!((norm - want).abs() <= tolerance * want, "step {step}: norm {norm}, expected {want}");
        clipped += i32::from(want > OPTIONS.clip_norm);
        for (got, want) in weights.iter().zip(&reference.weights) {
            assert_close(&format!("weights after step {step}"), &got.detach().to_kind(Kind::Double), want, tolerance);
        }
    }
    // The case is one only if some steps are clipped and some are not.
    assert!((1..30).contains(&clipped), "{clipped} of 30 steps were clipped");
}

#[test]
fn follows_the_reference_in_single_precision() {
    follows_the_reference(Kind::Float, 2e-5);
}

#[test]
fn follows_the_reference_in_double_precision() {
    // The norm is reported in f32 in both.
    follows_the_reference(Kind::Double, 1e-7);
}

#[test]
fn micro_batches_accumulate_to_the_whole_batch() {
    let run = |n_parts: i64| {
        let made = leaves(Kind::Double);
        let weights: Vec<Tensor> = made.iter().map(|leaf| leaf.weight.master().shallow_clone()).collect();
        let mut optimizer = AdamW::new(made, OPTIONS).unwrap();
        for _ in 0..3 {
            optimizer.zero_grad().unwrap();
            for _ in 0..n_parts {
                (loss(&weights, 1) / n_parts as f64).backward();
            }
            let _norm = optimizer.step(0.01).unwrap();
        }
        weights
    };
    for (whole, parts) in run(1).iter().zip(&run(4)) {
        assert_close("weights", &parts.detach(), &whole.detach(), 1e-12);
    }
}

#[test]
fn the_state_goes_over_to_another_optimiser_bit_for_bit() {
    let train = |optimizer: &mut AdamW, weights: &[Tensor], steps: std::ops::Range<i64>| {
        for step in steps {
            optimizer.zero_grad().unwrap();
            loss(weights, step).backward();
            let _norm = optimizer.step(0.01).unwrap();
        }
    };
    let start = || {
        let made = leaves(Kind::Float);
        let weights: Vec<Tensor> = made.iter().map(|leaf| leaf.weight.master().shallow_clone()).collect();
        (AdamW::new(made, OPTIONS).unwrap(), weights)
    };
    let (mut whole, whole_weights) = start();
    train(&mut whole, &whole_weights, 0..10);

    let (mut first, first_weights) = start();
    train(&mut first, &first_weights, 0..4);
    let (mut second, second_weights) = start();
    for (to, from) in second_weights.iter().zip(&first_weights) {
        tch::no_grad(|| to.shallow_clone().copy_(from));
    }
    second.load_state(&first.state()).unwrap();
    train(&mut second, &second_weights, 4..10);
    assert!(whole_weights.iter().zip(&second_weights).all(|(a, b)| a.equal(b)));
    assert!(whole.state().iter().zip(&second.state()).all(|((n, a), (m, b))| n == m && a.equal(b)));
}

#[test]
fn a_state_that_does_not_fit_is_named() {
    let mut optimizer = AdamW::new(leaves(Kind::Float), OPTIONS).unwrap();
    let mut state = optimizer.state();
    state[1].1 = Tensor::zeros([2, 2], (Kind::Float, Device::Cpu));
    assert!(optimizer.load_state(&state).unwrap_err().contains("exp_avg.embed.weight has shape [2, 2]"));
    let _removed = state.remove(1);
    assert!(optimizer.load_state(&state).unwrap_err().contains("it has no exp_avg.embed.weight"));
    state.push(("exp_avg.ghost".to_owned(), Tensor::from(0f32)));
    assert!(optimizer.load_state(&state).unwrap_err().contains("exp_avg.ghost"));
}

#[test]
fn leaves_that_cannot_be_optimised_are_refused() {
    assert!(AdamW::new(Vec::new(), OPTIONS).is_err());
    let frozen = Tensor::zeros([2], (Kind::Float, Device::Cpu));
    let frozen = Param { name: "frozen".to_owned(), weight: Weight::new(frozen), decay: Decay::No };
    let error = AdamW::new(vec![frozen], OPTIONS);
    assert!(error.unwrap_err().to_string().contains("frozen"));
}

#[test]
fn a_weight_that_is_not_finite_shows_in_the_norm() {
    let made = leaves(Kind::Float);
    let weight = made[1].weight.master().shallow_clone();
    let optimizer = AdamW::new(made, OPTIONS).unwrap();
    assert!(optimizer.params_norm().unwrap().is_finite());
    let _ = tch::no_grad(|| weight.narrow(0, 1, 1).fill_(f64::NAN));
    assert!(!optimizer.params_norm().unwrap().is_finite());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// Clipping scales all gradients by one factor, to the norm asked for or not at all.
    #[test]
    fn clipping_keeps_the_direction(values in prop::collection::vec(-1e3f32..1e3, 2..30), clip in 0.01f64..100.) {
        let weight = Tensor::zeros([values.len() as i64], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let leaf = Param { name: "w".to_owned(), weight: Weight::new(weight.shallow_clone()), decay: Decay::No };
        let mut optimizer = AdamW::new(vec![leaf], AdamWOptions { clip_norm: clip, ..OPTIONS }).unwrap();
        let grad = Tensor::from_slice(&values);
        (&weight * &grad).sum(None).backward();
        let norm = optimizer.step(1e-3).unwrap().double_value(&[]);
        let want = grad.norm().double_value(&[]);
        prop_assert!((norm - want).abs() <= 1e-5 * want);
        let clipped = weight.grad();
        prop_assert!(clipped.norm().double_value(&[]) <= clip.min(want) * (1. + 1e-4));
        let factor = (clip / (want + 1e-6)).min(1.);
        prop_assert!((clipped - grad * factor).abs().max().double_value(&[]) <= 1e-3);
    }
}
