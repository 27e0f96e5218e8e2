//! Rounding to fp8 and the linear map in fp8, against their definitions.

use flowhn_torch::testing::{Case, noise, same_bits};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::fp8::{Fp8Scales as Scales, Role, Rounded, cast, next_scales};
use crate::{Bias, Init, Linear, Params, SwiGluMlp, swiglu};

use super::{ensure, grad_of, results};

/// Rows, and columns in multiples of 16.
const MATRICES: [[i64; 2]; 8] =
    [[1, 16], [3, 32], [16, 128], [31, 144], [129, 112], [128, 128], [300, 272], [1000, 1056]];
/// Tokens, width in, width out.
const LINEARS: [[i64; 3]; 7] =
    [[1, 16, 16], [7, 32, 48], [16, 16, 160], [31, 208, 64], [96, 128, 128], [250, 272, 544], [1000, 512, 256]];

/// A part of a matrix.
type View = fn(&Tensor) -> Tensor;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for [n_rows, n_cols] in MATRICES {
        let name = format!("fp8: rounding {n_rows} x {n_cols}");
        cases.push(Case::new(name, move |device| rounding(n_rows, n_cols, |x| x.shallow_clone(), device)));
    }
    let views: [(&str, View); 3] = [
        ("rows with gaps", |x| x.narrow(1, 8, 48)),
        ("rows that no vector fits", |x| x.narrow(1, 3, 48)),
        ("columns", |x| x.narrow(1, 0, 64).tr()),
    ];
    for (what, view) in views {
        cases.push(Case::new(format!("fp8: rounding {what}"), move |device| rounding(64, 80, view, device)));
    }
    cases.push(Case::new("fp8: every bf16 number", every_number));
    cases.push(Case::new("fp8: the scales of the next step", next_step));
    for [n_tokens, d_in, d_out] in LINEARS {
        let name = format!("fp8: linear of {n_tokens} tokens, {d_in} to {d_out}");
        cases.push(Case::new(name, move |device| linear([n_tokens, d_in, d_out], Bias::None, Kind::Float, device)));
    }
    cases.push(Case::new("fp8: linear with a bias", |device| {
        linear([40, 64, 32], Bias::Init(Init::Ones), Kind::Float, device)
    }));
    for [n_tokens, d_model, d_ff] in [[1, 16, 16], [37, 48, 144], [300, 128, 272]] {
        let name = format!("fp8: MLP of {n_tokens} tokens, {d_model} through {d_ff}");
        cases.push(Case::new(name, move |device| mlp([n_tokens, d_model, d_ff], Kind::Float, device)));
    }
    for shape @ [n_tokens, d_in, d_out] in [[31, 208, 64], [250, 272, 544]] {
        let name = format!("fp8: linear of {n_tokens} tokens, {d_in} to {d_out}, gradients in bf16");
        cases.push(Case::new(name, move |device| linear(shape, Bias::Init(Init::Ones), Kind::BFloat16, device)));
    }
    cases.push(Case::new("fp8: MLP of 37 tokens, 48 through 144, gradients in bf16", |device| {
        mlp([37, 48, 144], Kind::BFloat16, device)
    }));
    cases.push(Case::new("fp8: what is not finite comes out", not_finite));
    cases.push(Case::new("fp8: zeros stay zeros", zeros));
    cases.push(Case::new("fp8: weights are rounded anew where they change", weights_change));
    cases
}

/// The device's bits and note of the largest value, against the CPU's and, with memory that was not clean, its own.
fn rounding(n_rows: i64, n_cols: i64, view: fn(&Tensor) -> Tensor, device: Device) -> Result<String> {
    let wild = (noise(&[n_rows, n_cols], 1) * 9.).exp() * noise(&[n_rows, n_cols], 2);
    compare(&view(&wild.to_kind(Kind::BFloat16)), device)
}

fn every_number(device: Device) -> Result<String> {
    let bits: Vec<i16> = (i16::MIN..=i16::MAX).collect();
    compare(&Tensor::from_slice(&bits).view_dtype(Kind::BFloat16).view([256, 256]), device)
}

fn compare(x: &Tensor, device: Device) -> Result<String> {
    // A copy to another device keeps no gaps: those of the view are made there.
    let x_device = match x.is_contiguous() {
        true => x.to_device(device),
        false => {
            let wide = Tensor::full([x.size()[0], x.size()[1] + 24], 7., (Kind::BFloat16, device));
            let offset = if (x.data_ptr() as usize).is_multiple_of(16) { 8 } else { 3 };
            let mut inside = wide.narrow(1, offset, x.size()[1]);
            inside.f_copy_(x)?;
            inside
        }
    };
    for (slot_idx, role) in [Role::Activation, Role::Weight, Role::Gradient].into_iter().enumerate() {
        let run = |x: &Tensor, poison: f64| -> Result<[Tensor; 3]> {
            let slot = &Scales::new(1, x.device())?.slots(0)?[slot_idx];
            slot.seed_with(|| Ok(Tensor::full([1], 0.75, (Kind::Float, x.device()))))?;
            let out = Rounded::empty(x.size()[0], x.size()[1], true, true, x, role.format())?;
            let missing = || Error::invalid("fp8", "there is no result");
            let (plain, transposed) =
                (out.plain.as_ref().ok_or_else(missing)?, out.transposed.as_ref().ok_or_else(missing)?);
            for t in [plain, transposed] {
                let _ = t.view_dtype(Kind::Uint8).f_fill_(poison)?;
            }
            cast(x, slot, &out)?;
            let on_cpu = |t: &Tensor| t.to_device(Device::Cpu);
            Ok([
                on_cpu(&plain.view_dtype(Kind::Uint8)),
                on_cpu(&transposed.view_dtype(Kind::Uint8)),
                on_cpu(slot.numbers()),
            ])
        };
        let (got, again, want) = (run(&x_device, 255.)?, run(&x_device, 0.)?, run(x, 1.)?);
        let same = |a: &[Tensor; 3], b: &[Tensor; 3]| (0..3).map(|i| a[i].equal(&b[i])).collect::<Vec<_>>();
        ensure(same(&got, &again) == [true; 3], || format!("{role:?}: two runs differ in {:?}", same(&got, &again)))?;
        // The CPU's NaN may have a sign; to compare bits, all are one.
        let one_nan = |t: &Tensor| {
            let magnitude = t.bitwise_and(0x7f);
            let is_nan = if role == Role::Gradient { magnitude.gt(0x7c) } else { magnitude.eq(0x7f) };
            t.masked_fill(&is_nan, 0x7f)
        };
        let [got, want] =
            [got, want].map(|[plain, transposed, numbers]| [one_nan(&plain), one_nan(&transposed), numbers]);
        ensure(same(&got, &want) == [true; 3], || format!("{role:?}: not the CPU's bits: {:?}", same(&got, &want)))?;
    }
    Ok("the CPU's bits".to_owned())
}

/// The kernel's scales are those of the formula.
fn next_step(device: Device) -> Result<String> {
    let values = [0f32, 1e-38, 3e-7, 0.03, 0.75, 1., 3., 447., 1e5, 3e38, f32::INFINITY, f32::NAN];
    let mut table = Vec::new();
    for largest in values {
        for held in [-1., 0., 1e-30, 0.9, 1., 1.99, 5e4, 3e38] {
            for _ in 0..3 {
                table.extend([0f32, 0., largest, held]);
            }
        }
    }
    let table = Tensor::from_slice(&table).view([-1, 4]);
    for first in [Role::Activation, Role::Weight, Role::Gradient] {
        let on_device = table.to_device(device).copy();
        let on_cpu = table.copy();
        next_scales(&on_device, first)?;
        next_scales(&on_cpu, first)?;
        ensure(on_device.to_device(Device::Cpu).equal(&on_cpu), || {
            format!("the table that begins with {first:?} differs")
        })?;
    }
    Ok(format!("{} scales", 3 * table.size()[0]))
}

/// A projection in fp8 whose weights are noise.
fn projection(d_in: i64, d_out: i64, bias: Bias, device: Device) -> Result<(Params, Linear)> {
    let mut params = Params::new(device, 0);
    let linear = Linear::new(&mut params.root(), "proj", d_in, d_out, Init::Zeros, bias)?;
    params.assign("proj.weight", &(noise(&[d_out, d_in], 3) * 0.05))?;
    params.refresh_bf16_copies()?;
    let found = params.use_fp8(|_| true)?;
    ensure(found.n_fp8 == 1 && found.n_meant == 1, || format!("{found:?}"))?;
    params.begin_fp8_step()?;
    Ok((params, linear))
}

/// Output and gradients against exact sums of the bf16 values, with bounds on the error of each element: a factor is off by at most half a
/// step of its format, `2^-4` or `2^-3` of itself, or half the smallest number over the scale; sums in the hardware keep at least 13 bits
/// of the largest addend; and results are rounded once.
fn linear([n_tokens, d_in, d_out]: [i64; 3], bias: Bias, grad_kind: Kind, device: Device) -> Result<String> {
    let (params, projection) = projection(d_in, d_out, bias, device)?;
    params.use_bf16_grads(|_| grad_kind == Kind::BFloat16)?;
    let bf16 = |shape: &[i64], seed, size: f64| (noise(shape, seed) * size).to_kind(Kind::BFloat16).to_device(device);
    let (x, dy) = (bf16(&[n_tokens, 1, d_in], 1, 3.), bf16(&[n_tokens, 1, d_out], 2, 1e-5));
    let run = || results(&params, &projection, [&x, &dy], grad_kind);
    // The second step has scales of its own, from what the first saw.
    let (got, same) = (run()?, run()?);
    ensure((0..3).all(|i| got[i].equal(&same[i])), || "two runs differ".to_owned())?;
    params.begin_fp8_step()?;
    let later = run()?;

    let exact = |t: &Tensor| t.to_device(Device::Cpu).to_kind(Kind::Double).view([-1, *t.size().last().unwrap_or(&1)]);
    let (x, dy, w) = (exact(&x), exact(&dy), exact(&projection.weight().bf16()?));
    let bias = projection.bias().map_or_else(|| Tensor::from(0.), |bias| exact(bias.master()));
    // Of factors a and b with relative and absolute errors: the largest error of the sum of products.
    let off = |a: &Tensor, a_off: &Tensor, b: &Tensor, b_off: &Tensor| {
        let sums = (a.abs() + a_off).matmul(&(b.abs() + b_off));
        &sums - a.abs().matmul(&b.abs()) + &sums * 2f64.powi(-10)
    };
    let rounding = |t: &Tensor, step: f64, least: f64| t.abs() * step + t.abs().max() * least;
    // With the scale, the largest value is at least a quarter of 2^8 or 2^15; the smallest numbers are 2^-9 and 2^-16.
    let (x_off, w_off, dy_off) = (
        rounding(&x, 2f64.powi(-4), 2f64.powi(-16)),
        rounding(&w, 2f64.powi(-4), 2f64.powi(-16)),
        rounding(&dy, 2f64.powi(-3), 2f64.powi(-30)),
    );
    let wants = [
        (x.matmul(&w.tr()) + bias, off(&x, &x_off, &w.tr(), &w_off.tr())),
        (dy.matmul(&w), off(&dy, &dy_off, &w, &w_off)),
        (dy.tr().matmul(&x), off(&dy.tr(), &dy_off.tr(), &x, &x_off)),
    ];
    let mut worst = 0f64;
    for results in [&got, &later] {
        for (name, (got, (want, off))) in ["output", "dx", "dw"].iter().zip(results.iter().zip(&wants)) {
            let error = (exact(got) - want).abs();
            let allowed = off + want.abs() * 2f64.powi(-7) + 1e-30;
            let share = (error / allowed).max().double_value(&[]);
            ensure(share <= 1., || format!("{name}: {share:.2} times the largest error that rounding explains"))?;
            worst = worst.max(share);
        }
    }
    Ok(format!("{:.0} % of the bound", 100. * worst))
}

/// The MLP without its values in memory, against its three operations: the same bits, also of the scales.
fn mlp([n_tokens, d_model, d_ff]: [i64; 3], grad_kind: Kind, device: Device) -> Result<String> {
    let bf16 = |seed, size: f64| (noise(&[n_tokens, d_model], seed) * size).to_kind(Kind::BFloat16).to_device(device);
    let run = |fused: bool| -> Result<Vec<Tensor>> {
        let mut params = Params::new(device, 0);
        let mlp = SwiGluMlp::new(&mut params.root(), d_model, d_ff, Init::Zeros, Init::Zeros, &Bias::None)?;
        params.assign("gate_up_proj.weight", &(noise(&[2 * d_ff, d_model], 3) * 0.2))?;
        params.assign("down_proj.weight", &(noise(&[d_model, d_ff], 4) * 0.1))?;
        params.refresh_bf16_copies()?;
        params.use_fp8(|_| true)?;
        params.use_bf16_grads(|_| grad_kind == Kind::BFloat16)?;
        let mut results = Vec::new();
        for step in 0..2 {
            params.begin_fp8_step()?;
            params.zero_grad()?;
            let x = bf16(1 + step, 3.).set_requires_grad(true);
            let y = match fused {
                true => mlp.forward(&x)?,
                false => mlp.down_proj().forward(&swiglu(&mlp.gate_up_proj().forward(&x)?)?)?,
            };
            (&y * bf16(5, 1e-4)).sum(Kind::Float).f_backward()?;
            results.extend([y.detach(), x.grad()]);
            for param in params.iter() {
                results.push(grad_of(&param.weight, grad_kind)?);
            }
            results.extend(params.fp8_scales().map(|scales| scales.copy()));
        }
        Ok(results)
    };
    let (fused, apart) = (run(true)?, run(false)?);
    let differs = (0..fused.len()).find(|&i| !same_bits(&fused[i], &apart[i]));
    ensure(differs.is_none() && fused.len() == 10, || format!("result {differs:?} differs"))?;
    Ok("the same bits".to_owned())
}

fn not_finite(device: Device) -> Result<String> {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let (_params, projection) = projection(32, 48, Bias::None, device)?;
        let x = noise(&[20, 32], 1).to_kind(Kind::BFloat16).to_device(device);
        let dy = noise(&[20, 48], 2).to_kind(Kind::BFloat16).to_device(device);
        // The scales are chosen before.
        let run = |x: &Tensor, dy: &Tensor| -> Result<[Vec<bool>; 2]> {
            let x = x.detach().set_requires_grad(true);
            let y = projection.forward(&x)?;
            let grads = Tensor::f_run_backward(&[(&y * dy).sum(Kind::Float)], &[&x], false, false)?;
            let rows = |t: &Tensor| Vec::<bool>::try_from(t.isfinite().all_dim(1, false).to_device(Device::Cpu));
            Ok([rows(&y.detach())?, rows(&grads[0])?])
        };
        let clean = run(&x, &dy)?;
        ensure(clean.iter().flatten().all(|&finite| finite), || "finite values became something else".to_owned())?;
        let x_bad = x.copy();
        let _ = x_bad.narrow(0, 4, 1).narrow(1, 9, 1).f_fill_(bad)?;
        let dy_bad = dy.copy();
        let _ = dy_bad.narrow(0, 7, 1).narrow(1, 30, 1).f_fill_(bad)?;
        let [y, dx] = run(&x_bad, &dy_bad)?;
        let only = |row: usize, finite: &[bool]| finite.iter().enumerate().all(|(i, &finite)| finite == (i != row));
        ensure(only(4, &y) && only(7, &dx), || format!("{bad} in one row is found in {y:?} and {dx:?}"))?;
    }
    Ok("in its row alone".to_owned())
}

fn zeros(device: Device) -> Result<String> {
    let (params, projection) = projection(32, 48, Bias::None, device)?;
    for n_steps in 0..3 {
        let x = Tensor::zeros([20, 32], (Kind::BFloat16, device)).set_requires_grad(true);
        let y = projection.forward(&x)?;
        (&y * 0.).sum(Kind::Float).f_backward()?;
        for t in [&y.detach(), &x.grad(), &projection.weight().master().grad()] {
            let n_others = t.count_nonzero(None::<i64>).int64_value(&[]);
            ensure(n_others == 0, || format!("{n_others} values are not 0 after {n_steps} steps"))?;
        }
        params.begin_fp8_step()?;
    }
    Ok("output and gradients".to_owned())
}

fn weights_change(device: Device) -> Result<String> {
    let (params, projection) = projection(32, 48, Bias::None, device)?;
    let x = noise(&[20, 32], 1).to_kind(Kind::BFloat16).to_device(device).set_requires_grad(true);
    let before = projection.forward(&x)?;
    params.assign("proj.weight", &(noise(&[48, 32], 3) * 0.025))?;
    let after = projection.forward(&x)?;
    // Half the weights round to half the numbers, but for the smallest.
    let largest = |t: &Tensor| t.abs().max().double_value(&[]);
    let off = largest(&(&before.detach() - &after.detach() * 2.)) / largest(&before.detach());
    ensure(off < 1e-2, || format!("half the weights gave another output, off by {off:.1e}"))?;
    let refused = before.sum(Kind::Float).f_backward();
    ensure(refused.is_err(), || "a backward pass went through weights that had changed".to_owned())?;
    let paused = params.pause_fp8();
    let exact = projection.forward(&x)?;
    drop(paused);
    let off = largest(&(exact - projection.forward(&x)?).detach());
    ensure(off > 0., || "nothing was paused".to_owned())?;
    Ok("at once".to_owned())
}
