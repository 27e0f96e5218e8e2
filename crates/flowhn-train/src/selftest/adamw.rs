//! AdamW against the formula in double precision, on whatever device.

use flowhn_nn::{Decay, Param, Weight};
use flowhn_torch::catch;
use flowhn_torch::testing::{Case, Rule, noise, same_bits};
use tch::{Device, Kind, Tensor};

use super::{ensure, told};
use crate::Result;
use crate::optim::{AdamW, AdamWOptions, StateType};

/// Parameters and steps of a case.
struct Task {
    /// Taken in turns.
    lengths: &'static [i64],
    n_params: usize,
    n_steps: i64,
}

/// Lengths around those of vectors and chunks of the kernels, more of them than addresses in a launch.
const MANY: Task =
    Task { lengths: &[70_001, 1, 0, 16_384, 16_385, 3, 32_767, 8, 5000, 0, 4, 1023], n_params: 64, n_steps: 50 };
/// More pieces than a GPU of 264 multiprocessors has warps to begin with.
const LARGE: Task = Task { lengths: &[12_000_001, 5000, 70_001, 3, 8, 1, 0, 1_000_000], n_params: 8, n_steps: 2 };
/// Blocks of codes that are whole, partial and not aligned, small enough to be recorded for compute-sanitizer (3 MB).
const FEW: Task = Task { lengths: &[4352, 5000, 16_384, 3, 0, 30_001], n_params: 12, n_steps: 3 };

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("adamw: 50 steps, all clipped", |device| told(follows_the_formula(1e-2, device))),
        Case::new("adamw: 50 steps, some clipped", |device| told(follows_the_formula(20., device))),
        Case::new("adamw: 50 steps without clipping", |device| told(follows_the_formula(0., device))),
        Case::new("adamw: gradients that are not finite", |device| told(not_finite(device))),
        Case::new("adamw: bf16 copies", |device| told(copies(StateType::Fp32, device))),
        Case::new("adamw: bf16 copies beside int8", |device| told(copies(StateType::Int8, device))),
        Case::new("adamw: what bf16 keeps is what the CPU keeps", |device| told(keeps(StateType::Bf16, &MANY, device))),
        Case::new("adamw: what int8 keeps is what the CPU keeps", |device| told(keeps(StateType::Int8, &MANY, device))),
        Case::new("adamw: what int8 keeps of a few blocks", |device| told(keeps(StateType::Int8, &FEW, device))),
        Case::new("adamw: what int8 keeps of gradients that are not finite", |device| told(keeps_not_finite(device))),
        // Much for a CPU.
        Case::on_cuda("adamw: int8, pieces beyond those that warps begin with", |device| {
            told(keeps(StateType::Int8, &LARGE, device))
        }),
    ]
}

fn options(clip_norm: f64) -> AdamWOptions {
    options_with(clip_norm, StateType::Fp32)
}

fn options_with(clip_norm: f64, state: StateType) -> AdamWOptions {
    AdamWOptions { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip_norm, state }
}

/// Parameters of odd lengths; every third begins in the middle of an aligned vector, and every fifth takes bf16 gradients.
fn params(task: &Task, device: Device) -> Result<Vec<Param>> {
    let param = |idx: usize| -> Result<Param> {
        let (n, offset) = (task.lengths[idx % task.lengths.len()], if idx % 3 == 2 { 1 + idx as i64 % 4 } else { 0 });
        let values = noise(&[n + offset], idx as i64).to_kind(Kind::Float).to_device(device);
        let leaf = values.narrow(0, offset, n).set_requires_grad(true);
        let decay = if idx % 2 == 1 { Decay::No } else { Decay::Yes };
        let weight = Weight::new(leaf);
        if idx % 5 == 2 {
            weight.use_bf16_grad()?;
        }
        Ok(Param { name: format!("p{idx}"), weight, decay })
    };
    (0..task.n_params).map(param).collect()
}

/// The gradient of a parameter in a step: of very different sizes, and none at all now and then.
fn gradient(param: &Param, idx: usize, step: i64) -> Option<Tensor> {
    let size = 10f64.powi((idx % 5) as i32 - 3) * if step % 3 == 0 { 1e-3 } else { 1. };
    let values = noise(&param.weight.size(), 1000 * (1 + step) + idx as i64) * size;
    let values = values.to_kind(param.weight.grad_kind()).to_device(param.weight.master().device());
    (idx != 3 && (idx as i64 + step) % 11 != 0).then_some(values)
}

/// Hands each parameter its gradient the way a backward pass does.
fn backward(params: &[Param], gradients: &[Option<Tensor>]) -> Result<()> {
    let products = params.iter().zip(gradients).filter_map(|(param, gradient)| {
        let gradient = gradient.as_ref()?;
        Some((param.weight.grad_leaf() * gradient).sum(Kind::Float))
    });
    let total = products.reduce(|a, b| a + b);
    Ok(catch(|| Ok(total.map_or(Ok(()), |total| total.f_backward())?))?)
}

/// The formula in plain operators, in the type of its tensors.
struct Plain {
    weights: Vec<Tensor>,
    means: Vec<Tensor>,
    mean_squares: Vec<Tensor>,
}

impl Plain {
    fn new(params: &[Param], kind: Kind) -> Self {
        let weights: Vec<Tensor> = params.iter().map(|p| p.weight.master().detach().copy().to_kind(kind)).collect();
        let zeros = || weights.iter().map(Tensor::zeros_like).collect();
        Self { means: zeros(), mean_squares: zeros(), weights }
    }

    /// Returns the norm.
    fn step(
        &mut self,
        params: &[Param],
        gradients: &[Option<Tensor>],
        options: &AdamWOptions,
        lr: f64,
        step: i64,
    ) -> f64 {
        let AdamWOptions { beta1, beta2, eps, weight_decay, clip_norm, .. } = *options;
        let squares = gradients.iter().flatten().map(|g| g.to_kind(Kind::Double).square().sum(Kind::Double));
        let norm = squares.reduce(|a, b| a + b).map_or(0., |sum| sum.double_value(&[]).sqrt());
        let factor = if clip_norm > 0. { (clip_norm / (norm + 1e-6)).min(1.) } else { 1. };
        let (scale1, scale2) = (1. - beta1.powi(step as i32), 1. - beta2.powi(step as i32));
        for (idx, param) in params.iter().enumerate() {
            let weight = &mut self.weights[idx];
            let gradient = match &gradients[idx] {
                Some(gradient) => gradient.to_kind(weight.kind()) * factor,
                None => weight.zeros_like(),
            };
            let (mean, mean_square) = (&mut self.means[idx], &mut self.mean_squares[idx]);
            *mean = &*mean * beta1 + &gradient * (1. - beta1);
            *mean_square = &*mean_square * beta2 + gradient.square() * (1. - beta2);
            let decay = if param.decay == Decay::Yes { lr * weight_decay } else { 0. };
            let root = mean_square.sqrt() / scale2.sqrt() + eps;
            *weight = &*weight * (1. - decay) - &*mean / root * (lr / scale1);
        }
        norm
    }

    /// Weights, means and mean squares of each parameter, under the names that the optimiser has for them.
    fn named(&self, params: &[Param]) -> Vec<(String, &Tensor)> {
        let kinds = [("", &self.weights), ("exp_avg.", &self.means), ("exp_avg_sq.", &self.mean_squares)];
        let of = |(prefix, tensors): (&str, &'_ Vec<Tensor>)| -> Vec<String> {
            tensors.iter().zip(params).map(|(_, param)| format!("{prefix}{}", param.name)).collect()
        };
        kinds.into_iter().flat_map(|kind| of(kind).into_iter().zip(kind.1)).collect()
    }
}

/// Tensors by name.
type Named = Vec<(String, Tensor)>;

/// What the optimiser holds, by the same names, and the norms of the steps.
fn run(options: AdamWOptions, task: &Task, device: Device) -> Result<(Named, Vec<f64>)> {
    let params = params(task, device)?;
    let mut optimizer = AdamW::new(params.clone(), options)?;
    let mut norms = Vec::new();
    for step in 1..=task.n_steps {
        optimizer.zero_grad()?;
        let gradients: Vec<_> = params.iter().enumerate().map(|(idx, p)| gradient(p, idx, step)).collect();
        backward(&params, &gradients)?;
        norms.push(optimizer.step(rate(step))?.double_value(&[]));
    }
    let mut held: Named = params.iter().map(|p| (p.name.clone(), p.weight.master().detach())).collect();
    held.extend(optimizer.state());
    Ok((held, norms))
}

/// A learning rate that f32 holds exactly, as it is held on a device.
fn rate(step: i64) -> f64 {
    f64::from(0.02f32 / step as f32)
}

fn follows_the_formula(clip_norm: f64, device: Device) -> Result<String> {
    let (held, norms) = run(options(clip_norm), &MANY, device)?;
    let (again, _) = run(options(clip_norm), &MANY, device)?;
    let params = params(&MANY, device)?;
    let (mut exact, mut plain) = (Plain::new(&params, Kind::Double), Plain::new(&params, Kind::Float));
    let mut n_clipped = 0;
    for (step, got) in (1..=MANY.n_steps).zip(&norms) {
        let gradients: Vec<_> = params.iter().enumerate().map(|(idx, p)| gradient(p, idx, step)).collect();
        let want = exact.step(&params, &gradients, &options(clip_norm), rate(step), step);
        let _norm = plain.step(&params, &gradients, &options(clip_norm), rate(step), step);
        ensure((got - want).abs() <= 1e-6 * want, || format!("step {step}: norm {got}, expected {want}"))?;
        n_clipped += i64::from(clip_norm > 0. && want > clip_norm);
    }
    let max_abs = |x: &Tensor| if x.numel() == 0 { 0. } else { x.abs().max().double_value(&[]) };
    let mut worst = 0f64;
    for ((name, exact), (_, plain)) in exact.named(&params).into_iter().zip(plain.named(&params)) {
        let find =
            |held: &[(String, Tensor)]| held.iter().find(|(own, _)| *own == name).map(|(_, x)| x.shallow_clone());
        let (Some(got), Some(again)) = (find(&held), find(&again)) else {
            return Err(flowhn_torch::Error::invalid("adamw", format!("it has no {name}")).into());
        };
        ensure(same_bits(&got, &again), || format!("{name} differs between two runs"))?;
        let error = |x: &Tensor| max_abs(&(x.to_kind(Kind::Double) - exact));
        let allowed = 2. * error(plain) + Rule::floor_of(Kind::Float) * max_abs(exact);
        let error = error(&got);
        ensure(error <= allowed, || format!("{name} is off by {error:.1e}, allowed {allowed:.1e}"))?;
        worst = worst.max(if allowed > 0. { error / allowed } else { 0. });
    }
    Ok(format!("{n_clipped} clipped, {:.0} % of the allowance", 100. * worst))
}

/// Without clipping, whose factor comes from sums that differ in their last digits, a device keeps the bits that the CPU keeps, and its
/// weights differ by the last digits of root and quotient.
fn keeps(state: StateType, task: &Task, device: Device) -> Result<String> {
    /// Of the largest weight, after all steps.
    const MAX_REL: f64 = 1e-5;
    let run = |device| run(options_with(0., state), task, device).map(|(held, _)| held);
    let (held, again, want) = (run(device)?, run(device)?, run(Device::Cpu)?);
    let mut worst = 0f64;
    for (((name, got), (_, again)), (_, want)) in held.iter().zip(&again).zip(&want) {
        ensure(same_bits(got, again), || format!("{name} differs between two runs"))?;
        let got = got.to_device(Device::Cpu);
        if name.starts_with("exp_avg") {
            ensure(same_bits(&got, want), || format!("{name} is not what the CPU keeps"))?;
        } else if got.numel() > 0 {
            let error = ((&got - want).abs().max() / want.abs().max()).double_value(&[]);
            ensure(error <= MAX_REL, || format!("{name} is off by {error:.1e}"))?;
            worst = worst.max(error);
        }
    }
    ensure(held.len() == want.len() && held.len() > task.n_params, || format!("{} tensors", held.len()))?;
    Ok(format!("{} tensors, weights within {worst:.0e}", held.len()))
}

fn not_finite(device: Device) -> Result<String> {
    for (value, clip_norm) in [(f64::NAN, 1.), (f64::INFINITY, 1.), (f64::INFINITY, 0.)] {
        let leaf = |n: i64| Tensor::ones([n], (Kind::Float, device)).set_requires_grad(true);
        let param = |name: &str, n| Param { name: name.to_owned(), weight: Weight::new(leaf(n)), decay: Decay::No };
        let params = [param("a", 5), param("b", 3)];
        let mut optimizer = AdamW::new(params.to_vec(), options(clip_norm))?;
        let gradients = [5, 3].map(|n| Some(Tensor::ones([n], (Kind::Float, device))));
        if let Some(gradient) = &gradients[0] {
            let _ = gradient.narrow(0, 2, 1).fill_(value);
        }
        backward(&params, &gradients)?;
        let norm = optimizer.step(0.01)?.double_value(&[]);
        ensure(norm.is_nan() == value.is_nan() && !norm.is_finite(), || format!("the norm of {value} is {norm}"))?;
        // The factor is NaN for NaN, and 0 for infinity, which leaves NaN where the gradient was infinite.
        let finite = |param: &Param| -> Vec<bool> {
            let finite = param.weight.master().detach().isfinite();
            (0..finite.numel() as i64).map(|i| finite.int64_value(&[i]) != 0).collect()
        };
        let rest = !(value.is_nan() && clip_norm > 0.);
        let (a, b) = (finite(&params[0]), finite(&params[1]));
        ensure(a == [rest, rest, false, rest, rest] && b == [rest; 3], || {
            format!("{value}, {clip_norm}: {a:?} {b:?}")
        })?;
    }
    Ok(String::new())
}

/// One element in a block of 256 is not finite: the codes of all blocks are the CPU's.
fn keeps_not_finite(device: Device) -> Result<String> {
    const LENGTH: i64 = 5000;
    let run = |value: f64, device: Device| -> Result<Named> {
        let values = noise(&[LENGTH], 1).to_kind(Kind::Float).to_device(device).set_requires_grad(true);
        let params = [Param { name: "a".to_owned(), weight: Weight::new(values), decay: Decay::Yes }];
        let mut optimizer = AdamW::new(params.to_vec(), options_with(0., StateType::Int8))?;
        for step in 1..=2 {
            optimizer.zero_grad()?;
            let gradient = noise(&[LENGTH], 10 + step).to_kind(Kind::Float).to_device(device);
            let _ = gradient.narrow(0, 300, 1).fill_(value);
            backward(&params, &[Some(gradient)])?;
            let _norm = optimizer.step(0.01)?;
        }
        Ok(optimizer.state())
    };
    let mut n_codes = 0;
    for value in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
        for ((name, got), (_, want)) in run(value, device)?.iter().zip(&run(value, Device::Cpu)?) {
            let got = got.to_device(Device::Cpu);
            // NaN has many bit patterns.
            let is_same = match got.kind() {
                Kind::Uint8 => same_bits(&got, want),
                _ => got.allclose(want, 0., 0., true),
            };
            ensure(is_same, || format!("{value}: {name} is not what the CPU keeps"))?;
            n_codes += usize::from(got.kind() == Kind::Uint8) * got.numel();
        }
    }
    ensure(n_codes == 3 * 2 * LENGTH as usize, || format!("{n_codes} codes"))?;
    Ok(format!("{n_codes} codes"))
}

fn copies(state: StateType, device: Device) -> Result<String> {
    let mut list = flowhn_nn::Params::new(device, 0);
    let mut root = list.root();
    for (name, n) in [("a", 20_000), ("b", 33), ("c", 7)] {
        let weight = root.weight(name, &[n], flowhn_nn::Init::Normal { std: 1. }, Decay::Yes)?;
        if name != "c" {
            weight.want_bf16_copy();
        }
    }
    let params: Vec<Param> = list.iter().cloned().collect();
    let mut optimizer = AdamW::of_params(&list, options_with(1., state))?;
    let mut step = |count: i64| -> Result<()> {
        optimizer.zero_grad()?;
        let gradients: Vec<_> = params.iter().enumerate().map(|(idx, p)| gradient(p, idx, count)).collect();
        backward(&params, &gradients)?;
        let _norm = optimizer.step(0.01)?;
        Ok(())
    };
    let check = |when: &str| -> Result<()> {
        for param in &params {
            let (got, master) = (param.weight.bf16()?, param.weight.master().detach());
            ensure(same_bits(&got, &master.to_kind(Kind::BFloat16)), || format!("{} {when} is old", param.name))?;
        }
        Ok(())
    };
    // Before there are copies, with them, and after weights were written from elsewhere.
    step(1)?;
    list.refresh_bf16_copies()?;
    check("once made")?;
    for count in 2..6 {
        step(count)?;
        check("after a step")?;
    }
    let has_copy = |param: &Param| param.weight.bf16_copy().map(|copy| copy.is_some());
    let kept = params.iter().map(has_copy).collect::<flowhn_torch::Result<Vec<_>>>()?;
    ensure(kept == [true, true, false], || format!("copies: {kept:?}"))?;
    list.assign("a", &noise(&[20_000], 5))?;
    check("after a load")?;
    list.assign("b", &noise(&[33], 6))?;
    step(7)?;
    check("after a load and a step")?;
    Ok(String::new())
}
