//! Inputs and comparisons that all tests share.

use flowhn_torch::Result;
use tch::{Device, Kind, Tensor};

/// Fixed values in -1..1 that look random, f64.
pub fn noise(shape: &[i64], seed: i64) -> Tensor {
    let n: i64 = shape.iter().product();
    let index = Tensor::arange(n, (Kind::Double, Device::Cpu)) + (seed * 7919) as f64;
    let hashed = (index * 12.9898).sin() * 43_758.545_3;
    (((&hashed - hashed.floor()) * 2.) - 1.).view(shape)
}

/// Fixed ids in `0..n`.
pub fn ids(shape: &[i64], n: i64, seed: i64) -> Tensor {
    ((noise(shape, seed) + 1.) * (n as f64 / 2.)).floor().clamp(0., (n - 1) as f64).to_kind(Kind::Int64)
}

/// The output of `f`, then the gradient of every float input for a fixed direction of the output.
pub fn value_and_grads(f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]) -> Vec<Tensor> {
    let leaf = |x: &Tensor| match x.is_floating_point() {
        true => x.detach().set_requires_grad(true),
        false => x.shallow_clone(),
    };
    let leaves: Vec<Tensor> = inputs.iter().map(leaf).collect();
    let out = f(&leaves).unwrap();
    let direction = noise(&out.size(), 99).to_kind(out.kind());
    let wanted: Vec<&Tensor> = leaves.iter().filter(|x| x.requires_grad()).collect();
    let mut results = Tensor::run_backward(&[(&out * direction).sum(out.kind())], &wanted, false, false);
    results.insert(0, out.detach());
    results
}

/// Asserts the rule for kernels: where `inputs` (f64) are rounded to `kind`, the kernel's error against the plain
/// formula in f64 is at most twice the error of the plain formula in `kind`, plus a floor relative to the largest
/// value. Values and all gradients.
#[track_caller]
pub fn assert_rule(
    what: &str,
    kernel: impl Fn(&[Tensor]) -> Result<Tensor>,
    plain: impl Fn(&[Tensor]) -> Tensor,
    inputs: &[Tensor],
    kind: Kind,
) {
    // A few roundings: long sums in another order may differ by that much where the plain formula happens to be exact.
    let floor = if kind == Kind::BFloat16 { 2e-3 } else { 1e-6 };
    let cast = |kind: Kind| -> Vec<Tensor> {
        inputs.iter().map(|x| if x.is_floating_point() { x.to_kind(kind) } else { x.shallow_clone() }).collect()
    };
    let rounded = cast(kind);
    let exact_inputs: Vec<Tensor> = rounded
        .iter()
        .map(|x| if x.is_floating_point() { x.to_kind(Kind::Double) } else { x.shallow_clone() })
        .collect();
    let exact = value_and_grads(|x| Ok(plain(x)), &exact_inputs);
    let plain = value_and_grads(|x| Ok(plain(x)), &rounded);
    let kernel = value_and_grads(kernel, &rounded);
    for (i, ((kernel, plain), exact)) in kernel.iter().zip(&plain).zip(&exact).enumerate() {
        let part = if i == 0 { "value".to_owned() } else { format!("gradient {}", i - 1) };
        assert_eq!(kernel.size(), exact.size(), "{what}: shape of the {part}");
        assert_eq!(kernel.kind(), plain.kind(), "{what}: type of the {part}");
        if exact.numel() == 0 {
            continue;
        }
        let error = |got: &Tensor| (got.to_kind(Kind::Double) - exact).abs().max().double_value(&[]);
        let limit = 2. * error(plain) + floor * exact.abs().max().double_value(&[]);
        let got = error(kernel);
        assert!(got <= limit, "{what}, {kind:?}: {part} is off by {got:.3e}, allowed {limit:.3e}");
    }
}

/// Runs `f` on rayon pools of one and of two threads and asserts that every bit of every result agrees.
#[track_caller]
pub fn assert_same_on_any_threads(f: impl Fn() -> Vec<Tensor> + Send + Sync) {
    let run = |n_threads| rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap().install(&f);
    for (i, (one, two)) in run(1).iter().zip(&run(2)).enumerate() {
        assert!(one.equal(two), "result {i} depends on the number of threads");
    }
}
