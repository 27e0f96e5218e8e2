//! Gradients of whole models: against the loss itself, and on CUDA against those of the CPU.

use flowhn_torch::testing::Case;
use tch::{Device, Kind, Tensor, no_grad};

use super::small::{POLICIES, SEQ_LEN, VARIANTS, Variant, ids};
use super::{case, ensure, max_abs};
use crate::{Branches, Model, Result};

/// Most that a gradient in f32 may differ between devices, relative to the model's largest.
const MAX_REL: f64 = 1e-4;
/// Length of the step along the gradient; the change of the loss over it is the gradient's length, to second order.
const STEP: f64 = 3e-4;
/// Most that the two may differ.
const MAX_REL_CHANGE: f64 = 1e-2;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for variant in VARIANTS {
        let name = |what: &str| format!("gradients: {} {what}", variant.name());
        cases.push(case(name("are the change of the loss"), move |device| is_the_change(&variant, device)));
        for kind in [Kind::Float, Kind::BFloat16] {
            let name = name(&format!("{kind:?} equal those of the CPU"));
            cases.push(case(name, move |device| equals_the_cpu(&variant, kind, device)));
        }
        cases.push(case(name("of branches on two streams"), move |device| on_two_streams(&variant, device)));
    }
    cases
}

/// A loss over packed documents, with targets that do not count.
fn loss(model: &Model) -> Result<Tensor> {
    let device = model.device();
    let targets = ids(2, SEQ_LEN, 8, device);
    let _ = targets.narrow(1, 7, 3).fill_(crate::IGNORE_INDEX);
    let segments = Tensor::arange(SEQ_LEN as i64, (Kind::Int64, device)).floor_divide_scalar(19).repeat([2, 1]);
    model.loss(&ids(2, SEQ_LEN, 6, device), &targets, Some(&segments))
}

/// The loss and its gradients by parameter, in f32 on the CPU.
fn gradients(variant: &Variant, split: &str, kind: Kind, device: Device) -> Result<Vec<(String, Tensor)>> {
    gradients_with(variant, split, kind, device, Branches::Serial)
}

/// The same for branches in turn or beside each other.
fn gradients_with(
    variant: &Variant,
    split: &str,
    kind: Kind,
    device: Device,
    branches: Branches,
) -> Result<Vec<(String, Tensor)>> {
    let mut model = variant.model(split, device)?;
    model.set_compute_kind(kind);
    model.set_branches(branches)?;
    let value = loss(&model)?;
    value.f_backward()?;
    let to_cpu = |tensor: &Tensor| tensor.detach().to_device(Device::Cpu).to_kind(Kind::Float);
    let mut all = vec![("loss".to_owned(), to_cpu(&value))];
    for param in model.params().iter() {
        let master = param.weight.master();
        let grad = if master.grad().defined() { master.grad() } else { master.detach().zeros_like() };
        all.push((param.name.clone(), to_cpu(&grad)));
    }
    Ok(all)
}

fn is_the_change(variant: &Variant, device: Device) -> Result<String> {
    let policies = [POLICIES[0], POLICIES[5], POLICIES[9]];
    let mut worst = 0f64;
    for split in policies {
        let model = variant.model(split, device)?;
        loss(&model)?.f_backward()?;
        let params = || model.params().iter().map(|param| param.weight.master());
        let grads: Vec<Tensor> = params().map(Tensor::grad).collect();
        let norm = grads.iter().filter(|grad| grad.defined()).map(|grad| grad.square().sum(Kind::Double));
        let norm = norm.map(|sum| sum.double_value(&[])).sum::<f64>().sqrt();
        let move_by = |length: f64| {
            no_grad(|| {
                for (param, grad) in params().zip(&grads).filter(|(_, grad)| grad.defined()) {
                    let _ = param.shallow_clone().g_add_(&(grad * (length / norm)));
                }
            });
        };
        let loss_here = || Ok::<_, crate::Error>(no_grad(|| loss(&model))?.double_value(&[]));
        move_by(STEP);
        let up = loss_here()?;
        move_by(-2. * STEP);
        let down = loss_here()?;
        let change = (up - down) / (2. * STEP);
        let error = (change / norm - 1.).abs();
        ensure(error <= MAX_REL_CHANGE, || {
            format!("{split}: the loss changes by {change:.5}, the gradient is {norm:.5} long")
        })?;
        worst = worst.max(error);
    }
    Ok(format!("{} policies, {worst:.0e}", policies.len()))
}

fn equals_the_cpu(variant: &Variant, kind: Kind, device: Device) -> Result<String> {
    if device == Device::Cpu {
        return repeats(variant, kind);
    }
    let policies: &[&str] = if kind == Kind::Float { &POLICIES } else { &[POLICIES[0], POLICIES[9]] };
    let mut worst = 0f64;
    for split in policies {
        let got = gradients(variant, split, kind, device)?;
        let exact = gradients(variant, split, Kind::Float, Device::Cpu)?;
        let plain = gradients(variant, split, kind, Device::Cpu)?;
        let largest = exact[1..].iter().map(|(_, grad)| max_abs(grad)).fold(0f64, f64::max);
        for (((name, got), (_, exact)), (_, plain)) in got.iter().zip(&exact).zip(&plain) {
            // In f32 both are equally exact; in bf16 the plain one says how much rounding there is.
            let (error, plain) = (max_abs(&(got - exact)), max_abs(&(plain - exact)));
            let allowed = match kind {
                Kind::Float => MAX_REL * largest.max(max_abs(exact)),
                _ => 2. * plain + 1e-2 * largest,
            };
            ensure(error <= allowed, || format!("{split}: {name} is off by {error:.2e}, allowed {allowed:.2e}"))?;
            worst = worst.max(error / allowed);
        }
    }
    Ok(format!("{} policies, {:.0} % of the allowance", policies.len(), 100. * worst))
}

/// Branches beside each other give the bits of branches in turn; a CPU has no streams and says so.
fn on_two_streams(variant: &Variant, device: Device) -> Result<String> {
    if device == Device::Cpu {
        let refused = variant.model(POLICIES[1], device)?.set_branches(Branches::Streams);
        let message = refused.err().map(|error| error.to_string()).unwrap_or_default();
        ensure(message.contains("CUDA"), || format!("the CPU took two streams: {message:?}"))?;
        return Ok("refused".to_owned());
    }
    for split in [POLICIES[0], POLICIES[1], POLICIES[6]] {
        let serial = gradients_with(variant, split, Kind::Float, device, Branches::Serial)?;
        let beside = gradients_with(variant, split, Kind::Float, device, Branches::Streams)?;
        for ((name, a), (_, b)) in serial.iter().zip(&beside) {
            ensure(a.equal(b), || format!("{split}: {name} differs from that of branches in turn"))?;
        }
    }
    Ok("equal bits".to_owned())
}

/// On the CPU itself: two runs give the same bits, whatever the threads do.
fn repeats(variant: &Variant, kind: Kind) -> Result<String> {
    let split = POLICIES[9];
    let runs = [gradients(variant, split, kind, Device::Cpu)?, gradients(variant, split, kind, Device::Cpu)?];
    for ((name, a), (_, b)) in runs[0].iter().zip(&runs[1]) {
        ensure(a.equal(b), || format!("{name} differs between two runs"))?;
    }
    Ok("two runs give the same bits".to_owned())
}
