//! The linear map against its formula.

use flowhn_torch::Result;
use flowhn_torch::testing::{Case, Rule, noise};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{Bias, Init, Linear, Params, Weight, linear};

use super::{ensure, grads_add_in_place, results};

/// Widths of the result and of the token.
const SHAPES: [[i64; 2]; 8] =
    [[1, 8], [7, 264], [1152, 768], [768, 2048], [333, 5632], [65_536, 768], [9, 20], [64, 1]];

/// Tokens, width in, width out.
const PRODUCTS: [[i64; 3]; 5] = [[1, 16, 16], [7, 33, 48], [31, 208, 65], [250, 272, 544], [4096, 256, 128]];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [Kind::Float, Kind::BFloat16] {
        for [d_out, d_in] in SHAPES {
            let name = format!("linear: one token, {d_out} x {d_in}, {kind:?}");
            cases.push(Case::new(name, move |device| check(d_out, d_in, kind, device)));
        }
    }
    for grad_kind in [Kind::Float, Kind::BFloat16] {
        for shape @ [n_tokens, d_in, d_out] in PRODUCTS {
            let name =
                format!("linear: {n_tokens} tokens in bf16, {d_in} to {d_out}, the weight's gradient in {grad_kind:?}");
            cases.push(Case::new(name, move |device| products(shape, grad_kind, device)));
        }
        let name = format!("linear: gradients in {grad_kind:?} of two passes, added up by their products");
        cases.push(Case::new(name, move |device| adds_in_place(grad_kind, device)));
    }
    cases
}

/// A size that is small and one whose products are chosen.
fn adds_in_place(grad_kind: Kind, device: Device) -> Result<String> {
    let mut found = String::new();
    for [n_tokens, d_in, d_out] in [[31, 48, 40], [2048, 512, 768]] {
        let mut params = Params::new(device, 0);
        let projection = Linear::new(&mut params.root(), "proj", d_in, d_out, Init::Normal { std: 0.1 }, Bias::None)?;
        params.use_bf16_grads(|_| grad_kind == Kind::BFloat16)?;
        let x = [1, 2].map(|seed| noise(&[n_tokens, d_in], seed).to_kind(Kind::BFloat16).to_device(device));
        found = grads_add_in_place(&params, &|x| projection.forward(x), [&x[0], &x[1]])?;
    }
    Ok(found)
}

/// Output and gradients of bf16 activations against exact sums: one rounding of the result, and of sums in f32, or in bf16 where cuBLAS
/// splits them.
fn products([n_tokens, d_in, d_out]: [i64; 3], grad_kind: Kind, device: Device) -> Result<String> {
    let mut params = Params::new(device, 0);
    let projection = Linear::new(&mut params.root(), "proj", d_in, d_out, Init::Zeros, Bias::None)?;
    params.assign("proj.weight", &noise(&[d_out, d_in], 3))?;
    params.use_bf16_grads(|_| grad_kind == Kind::BFloat16)?;
    let bf16 = |shape: &[i64], seed| noise(shape, seed).to_kind(Kind::BFloat16).to_device(device);
    let (x, dy) = (bf16(&[n_tokens, 1, d_in], 1), bf16(&[n_tokens, 1, d_out], 2));
    let run = || results(&params, &projection, [&x, &dy], grad_kind);
    let (got, same) = (run()?, run()?);
    ensure((0..3).all(|i| got[i].equal(&same[i])), || "two runs differ".to_owned())?;

    let exact = |t: &Tensor| t.to_device(Device::Cpu).to_kind(Kind::Double).view([-1, *t.size().last().unwrap_or(&1)]);
    let (x, dy, w) = (exact(&x), exact(&dy), exact(&projection.weight().bf16()?));
    let factors = [(&x, w.tr()), (&dy, w.shallow_clone()), (&dy.tr(), x.shallow_clone())];
    let mut worst = 0f64;
    for (name, (got, (a, b))) in ["output", "dx", "dw"].iter().zip(got.iter().zip(&factors)) {
        let want = a.matmul(b);
        let allowed = want.abs() * 2f64.powi(-8) + a.abs().matmul(&b.abs()) * 2f64.powi(-9);
        let share = ((exact(got) - want).abs() / allowed).max().double_value(&[]);
        ensure(share <= 1., || format!("{name}: {share:.2} times the largest error that rounding explains"))?;
        worst = worst.max(share);
    }
    Ok(format!("{:.0} % of the bound", 100. * worst))
}

fn check(d_out: i64, d_in: i64, kind: Kind, device: Device) -> Result<String> {
    let kernel = |x: &[Tensor]| {
        let weight = Weight::new(x[1].detach().to_kind(Kind::Float));
        // A view with room around it, as a piece of a wider projection has.
        let wide = Tensor::cat(&[&x[0], &x[0]], -1).narrow(-1, 0, d_in);
        no_grad(|| Ok(vec![linear(&wide, &weight)?]))
    };
    let plain = |x: &[Tensor]| Ok(vec![x[0].detach().matmul(&x[1].detach().tr())]);
    let inputs = [noise(&[1, 1, d_in], 1), noise(&[d_out, d_in], 2)];
    Rule { kernel: &kernel, plain: &plain, floor: Rule::floor_of(kind) }.check(&inputs, &[kind; 2], device)
}
