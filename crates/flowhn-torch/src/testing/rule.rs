//! How the error of a kernel is judged.

use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// An operation as a function of its tensors.
pub(super) type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<Vec<Tensor>>;

/// The rule for kernels: where the inputs are rounded to their dtypes, the kernel's error against the formula in double precision
/// is at most twice the error that a plain implementation makes at the same dtypes, plus a floor. So for every output, and for the
/// gradient of every floating-point input.
pub struct Rule<'a> {
    /// The operation under test.
    pub kernel: Op<'a>,
    /// A plain implementation at the inputs' dtypes; called with doubles, it is the reference.
    pub plain: Op<'a>,
    /// Allowed beside the plain error, relative to the largest value: a few roundings, where the plain one happens to be exact.
    pub floor: f64,
}

impl Rule<'_> {
    /// A floor for outputs and gradients of this dtype.
    pub fn floor_of(kind: Kind) -> f64 {
        if kind == Kind::BFloat16 { 2e-3 } else { 2e-6 }
    }

    /// Checks the rule on `device`, and that two runs of the kernel give the same bits.
    ///
    /// `inputs` are doubles or not floating-point at all; `kinds` has the dtype that each is rounded to (ignored for those that are
    /// not floating-point). Every output is contracted with a fixed direction for the gradients. Returns the largest share of the
    /// allowance that was used.
    ///
    /// # Errors
    /// Those of the operations; [`Error::Invalid`] that names the output or gradient that is off.
    pub fn check(&self, inputs: &[Tensor], kinds: &[Kind], device: Device) -> Result<String> {
        self.check_at_scale(0., inputs, kinds, device)
    }

    /// As [`Rule::check`], where values of this size cancel inside the formula: the floor counts from it even where nothing that
    /// large is left.
    ///
    /// # Errors
    /// As there.
    pub fn check_at_scale(
        &self,
        least_scale: f64,
        inputs: &[Tensor],
        kinds: &[Kind],
        device: Device,
    ) -> Result<String> {
        self.judge(Runs::Equal, least_scale, inputs, kinds, device)
    }

    /// As [`Rule::check_at_scale`] for a kernel that is not deterministic: two runs may differ in their bits, and both are judged.
    ///
    /// # Errors
    /// As there.
    pub fn check_nondeterministic(
        &self,
        least_scale: f64,
        inputs: &[Tensor],
        kinds: &[Kind],
        device: Device,
    ) -> Result<String> {
        self.judge(Runs::Differ, least_scale, inputs, kinds, device)
    }

    fn judge(&self, runs: Runs, least_scale: f64, inputs: &[Tensor], kinds: &[Kind], device: Device) -> Result<String> {
        let rounded: Vec<Tensor> =
            inputs.iter().zip(kinds).map(|(x, kind)| round(x, *kind).to_device(device)).collect();
        let doubles: Vec<Tensor> = rounded.iter().map(|x| round(x, Kind::Double)).collect();
        let exact = values_and_grads(self.plain, &doubles)?;
        let plain = values_and_grads(self.plain, &rounded)?;
        let kernel = values_and_grads(self.kernel, &rounded)?;
        let again = values_and_grads(self.kernel, &rounded)?;

        let mut worst = (0f64, String::from("nothing to compare"));
        for (i, (name, got)) in kernel.iter().enumerate() {
            let want = &exact[i].1;
            same_shape(name, got, want)?;
            if runs == Runs::Equal && !same_bits(got, &again[i].1) {
                return fail(name, "differs between two runs".to_owned());
            }
            if want.numel() == 0 {
                continue;
            }
            let share_of = |got: &Tensor| self.share(name, [got, &plain[i].1, want], least_scale);
            let share = match runs {
                Runs::Equal => share_of(got)?,
                Runs::Differ => share_of(got)?.max(share_of(&again[i].1)?),
            };
            if share >= worst.0 {
                worst = (share, format!("{:.0} % of the allowance, by {name}", 100. * share));
            }
        }
        Ok(worst.1)
    }

    /// Checks what becomes of values that are too large or too small for careless arithmetic: the kernel is finite wherever the plain
    /// implementation is in f32, at the same rounded inputs, and each output and gradient that is finite everywhere obeys the rule.
    ///
    /// # Errors
    /// As [`Rule::check`]; also where nothing is finite everywhere.
    pub fn check_extremes(&self, inputs: &[Tensor], kinds: &[Kind], device: Device) -> Result<String> {
        let rounded: Vec<Tensor> =
            inputs.iter().zip(kinds).map(|(x, kind)| round(x, *kind).to_device(device)).collect();
        let as_kind = |kind| -> Vec<Tensor> { rounded.iter().map(|x| round(x, kind)).collect() };
        let exact = values_and_grads(self.plain, &as_kind(Kind::Double))?;
        let single = values_and_grads(self.plain, &as_kind(Kind::Float))?;
        let plain = values_and_grads(self.plain, &rounded)?;
        let kernel = values_and_grads(self.kernel, &rounded)?;
        let mut n_judged = 0;
        for (i, (name, got)) in kernel.iter().enumerate() {
            same_shape(name, got, &exact[i].1)?;
            let must_be_finite = single[i].1.isfinite();
            let n_lost = must_be_finite.logical_and(&got.isfinite().logical_not()).sum(Kind::Int64).int64_value(&[]);
            if n_lost > 0 {
                let message = format!("is not finite in {n_lost} of {} places, where the formula is", got.numel());
                return fail(name, message);
            }
            if must_be_finite.all().int64_value(&[]) == 1 {
                self.share(name, [got, &plain[i].1, &exact[i].1], 0.)?;
                n_judged += 1;
            }
        }
        match n_judged {
            0 => Err(Error::invalid("rule", "the formula is finite nowhere")),
            n => Ok(format!("finite where the formula is; {n} of {} everywhere, and near it", kernel.len())),
        }
    }

    /// The share of its allowance that a result uses, given with the plain one and the exact one; an error if it is more than all.
    fn share(&self, name: &str, [got, plain, want]: [&Tensor; 3], least_scale: f64) -> Result<f64> {
        let error = |x: &Tensor| max_abs(&(x.to_kind(Kind::Double) - want));
        let (kernel_error, plain_error, scale) = (error(got), error(plain), max_abs(want));
        let allowed = 2. * plain_error + self.floor * scale.max(least_scale);
        // Written so that NaN fails.
        let fits = kernel_error <= allowed;
        if !fits {
            let message = format!(
                "is off by {kernel_error:.3e}, allowed {allowed:.3e} (plain {plain_error:.3e}, largest value {scale:.3e})"
            );
            return fail(name, message);
        }
        Ok(if allowed > 0. { kernel_error / allowed } else { 0. })
    }
}

/// What two runs on the same inputs are to each other.
#[derive(PartialEq)]
enum Runs {
    Equal,
    Differ,
}

fn fail<T>(name: &str, message: String) -> Result<T> {
    Err(Error::invalid("rule", format!("{name} {message}")))
}

fn same_shape(name: &str, got: &Tensor, want: &Tensor) -> Result<()> {
    match got.size() == want.size() {
        true => Ok(()),
        false => fail(name, format!("has shape {:?}, expected {:?}", got.size(), want.size())),
    }
}

/// Names and values of the outputs, then of the gradients of the floating-point inputs.
fn values_and_grads(op: Op, inputs: &[Tensor]) -> Result<Vec<(String, Tensor)>> {
    let leaves = leaves_of(inputs);
    let outputs = op(&leaves)?;
    let directions = directions_of(&outputs);
    results(&leaves, &outputs, &directions)
}

/// The inputs anew, those that are floating-point as leaves that want a gradient.
pub(super) fn leaves_of(inputs: &[Tensor]) -> Vec<Tensor> {
    let leaf = |x: &Tensor| match x.is_floating_point() {
        true => x.detach().set_requires_grad(true),
        false => x.shallow_clone(),
    };
    inputs.iter().map(leaf).collect()
}

/// What each output is contracted with.
pub(super) fn directions_of(outputs: &[Tensor]) -> Vec<Tensor> {
    outputs.iter().enumerate().map(|(i, out)| direction(out, i)).collect()
}

/// Names and values of the outputs, then of the gradients of the leaves where the outputs are contracted with these directions.
pub(super) fn results(leaves: &[Tensor], outputs: &[Tensor], directions: &[Tensor]) -> Result<Vec<(String, Tensor)>> {
    let wanted: Vec<usize> = (0..leaves.len()).filter(|&i| leaves[i].requires_grad()).collect();
    let contracted: Vec<Tensor> = outputs
        .iter()
        .zip(directions)
        .filter(|(out, _)| out.requires_grad())
        .map(|(out, direction)| (out * direction).sum(out.kind()).to_kind(Kind::Double))
        .collect();
    let total = contracted.into_iter().reduce(|a, b| a + b);
    let mut results: Vec<(String, Tensor)> =
        outputs.iter().enumerate().map(|(i, out)| (format!("output {i}"), out.detach())).collect();
    let Some(total) = total else { return Ok(results) };
    let refs: Vec<&Tensor> = wanted.iter().map(|&i| &leaves[i]).collect();
    let grads = Tensor::f_run_backward(&[total], &refs, false, false)?;
    for (&i, grad) in wanted.iter().zip(grads) {
        let grad = if grad.defined() { grad } else { leaves[i].detach().zeros_like() };
        results.push((format!("gradient {i}"), grad));
    }
    Ok(results)
}

/// Fixed values in -1..1 without a pattern, the same on every device and, up to rounding, in every dtype.
fn direction(out: &Tensor, seed: usize) -> Tensor {
    noise(&out.size(), 99 + seed as i64).to_kind(out.kind()).to_device(out.device())
}

/// Fixed values in -1..1 that look random: double precision, on the CPU.
pub fn noise(shape: &[i64], seed: i64) -> Tensor {
    let n: i64 = shape.iter().product();
    let index = Tensor::arange(n, (Kind::Double, Device::Cpu)) + (seed * 7919) as f64;
    let hashed = (index * 12.9898).sin() * 43_758.545_3;
    (((&hashed - hashed.floor()) * 2.) - 1.).view(shape)
}

pub(super) fn round(x: &Tensor, kind: Kind) -> Tensor {
    if x.is_floating_point() { x.to_kind(kind) } else { x.shallow_clone() }
}

/// Whether two tensors agree in every bit, NaN included.
pub fn same_bits(a: &Tensor, b: &Tensor) -> bool {
    let bits = |t: &Tensor| match t.kind() {
        Kind::Float => t.contiguous().view_dtype(Kind::Int),
        Kind::Double => t.contiguous().view_dtype(Kind::Int64),
        Kind::BFloat16 | Kind::Half => t.contiguous().view_dtype(Kind::Int16),
        _ => t.shallow_clone(),
    };
    a.kind() == b.kind() && a.size() == b.size() && bits(a).equal(&bits(b))
}

fn max_abs(x: &Tensor) -> f64 {
    x.abs().max().double_value(&[])
}
