//! The LM head with its cross-entropy against the formula.

use flowhn_torch::testing::{Case, Rule, check_replay, noise, same_bits};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::{
    HeadMatrix, LOGITS_BYTES, Weight, linear_cross_entropy, linear_cross_entropy_within, reference, token_losses,
};

const IGNORED: i64 = -100;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [Kind::Float, Kind::BFloat16] {
        for vocab_size in [1, 7, 1000, 50_257] {
            for n_tokens in [1, 31, 1000] {
                // The widest vocabulary with few tokens only: the reference keeps all logits, in double precision.
                if vocab_size < 50_257 || n_tokens < 1000 {
                    let name =
                        format!("linear_cross_entropy: {kind:?}, {n_tokens} tokens x 20, vocabulary of {vocab_size}");
                    cases.push(Case::new(name, move |device| check(n_tokens, 20, vocab_size, kind, device)));
                }
            }
        }
        // Rows of a multiple of 8 in bf16 have kernels of their own on Hopper, with tiles of 128 tokens, 256 words and 64 values.
        for [n_tokens, d_model, vocab_size] in [[1, 8, 1], [31, 64, 257], [300, 384, 1003], [129, 712, 1800]] {
            let name =
                format!("linear_cross_entropy: {kind:?}, {n_tokens} tokens x {d_model}, vocabulary of {vocab_size}");
            cases.push(Case::new(name, move |device| check(n_tokens, d_model, vocab_size, kind, device)));
        }
        // What lies in the gradient of x before that comes has room there in all chunks of rows of 576, in all but the last of 512.
        for d_model in [12, 64, 512, 576] {
            let name = format!("linear_cross_entropy: {kind:?}, several chunks of rows of {d_model}");
            cases.push(Case::new(name, move |device| {
                // On the CPU a chunk has 64 rows of this vocabulary, on CUDA 2048 or 4096.
                let n_tokens = if device == Device::Cpu { 70 } else { 4200 };
                check(n_tokens, d_model, 65_536, kind, device)
            }));
        }
        for d_model in [20, 64] {
            let name = |what| format!("linear_cross_entropy: {kind:?}, rows of {d_model}, {what}");
            cases.push(Case::new(name("targets far below the largest logit"), move |device| {
                far_targets(d_model, kind, device)
            }));
            cases.push(Case::new(name("targets that are nearly certain"), move |device| {
                certain_targets(d_model, kind, device)
            }));
            cases.push(Case::new(name("one word is every target"), move |device| one_target(d_model, kind, device)));
            cases.push(Case::new(name("one gradient only"), move |device| one_gradient(d_model, kind, device)));
            cases.push(Case::new(name("every target ignored"), move |device| all_ignored(d_model, kind, device)));
            cases
                .push(Case::new(name("a target outside the vocabulary"), move |device| outside(d_model, kind, device)));
        }
        for d_model in [20, 64] {
            let name = format!("linear_cross_entropy: {kind:?}, rows of {d_model}, replayed from a CUDA graph");
            cases.push(Case::on_cuda(name, move |device| replays(d_model, kind, device)));
        }
        cases.push(Case::new(format!("linear_cross_entropy: {kind:?}, rows longer than registers"), move |device| {
            check(5, 12, 100_003, kind, device)
        }));
        for d_model in [18, 128] {
            let name = format!("token_losses: {kind:?}, rows of {d_model}");
            cases.push(Case::new(name, move |device| check_token_losses(d_model, kind, device)));
        }
    }
    for d_model in [20, 64] {
        let name = format!("linear_cross_entropy: BFloat16, rows of {d_model}, weight in f32");
        let kinds = [Kind::BFloat16, Kind::Float];
        cases.push(Case::new(name, move |device| check_kinds(70, d_model, 300, kinds, device)));
        let name = format!("linear_cross_entropy: BFloat16, rows of {d_model}, a weight with its bf16 copy");
        cases.push(Case::new(name, move |device| bf16_copy(d_model, device)));
        for (chunks, logits_bytes) in [("several chunks", 1 << 16), ("one chunk", LOGITS_BYTES)] {
            let name = format!("linear_cross_entropy: BFloat16, rows of {d_model}, gradient in bf16, {chunks}");
            cases.push(Case::new(name, move |device| bf16_grad(d_model, logits_bytes, device)));
        }
    }
    cases
}

fn check(n_tokens: i64, d_model: i64, vocab_size: i64, kind: Kind, device: Device) -> Result<String> {
    check_kinds(n_tokens, d_model, vocab_size, [kind, kind], device)
}

/// The types of x and of the weight, which is rounded to that of x.
fn check_kinds(
    n_tokens: i64,
    d_model: i64,
    vocab_size: i64,
    [kind, weight_kind]: [Kind; 2],
    device: Device,
) -> Result<String> {
    let inputs = [noise(&[n_tokens, d_model], 1), noise(&[vocab_size, d_model], 2) * 2., targets(n_tokens, vocab_size)];
    check_inputs(&inputs, [kind, weight_kind], Rule::floor_of(kind), device)
}

fn check_inputs(inputs: &[Tensor; 3], [kind, weight_kind]: [Kind; 2], floor: f64, device: Device) -> Result<String> {
    let plain =
        |t: &[Tensor]| Ok(vec![reference::linear_cross_entropy(&t[0], &t[1].to_kind(t[0].kind()), &t[2], IGNORED)]);
    let kernel = |t: &[Tensor]| Ok(vec![linear_cross_entropy(&t[0], &t[1], &t[2], IGNORED)?]);
    let rule = Rule { kernel: &kernel, plain: &plain, floor };
    rule.check(inputs, &[kind, weight_kind, kind], device)
}

/// Logits up to 240 apart, which are whole numbers, so that bf16 holds them and the plain formula rounds nothing but 1 / n. The
/// floor is what rounding three times to bf16 may do.
fn far_targets(d_model: i64, kind: Kind, device: Device) -> Result<String> {
    let (n_tokens, vocab_size) = (40, 300);
    let x = Tensor::eye(n_tokens, (Kind::Double, Device::Cpu)).narrow(1, 0, n_tokens.min(d_model));
    let x = x.constant_pad_nd([0, d_model - x.size()[1]]);
    let weight = (noise(&[vocab_size, d_model], 2) * 120.).round();
    let floor = if kind == Kind::BFloat16 { 3. / 256. } else { Rule::floor_of(kind) };
    check_inputs(&[x, weight, targets(n_tokens, vocab_size)], [kind, kind], floor, device)
}

/// Each token points the way of its target, whose probability is nearly 1.
fn certain_targets(d_model: i64, kind: Kind, device: Device) -> Result<String> {
    let targets = targets(200, 500);
    let weight = noise(&[500, d_model], 2);
    let x = weight.index_select(0, &targets.clamp_min(0)) * (45. / d_model as f64);
    check_inputs(&[x, weight, targets], [kind, kind], Rule::floor_of(kind), device)
}

fn one_target(d_model: i64, kind: Kind, device: Device) -> Result<String> {
    let targets = Tensor::full([150], 699, (Kind::Int64, Device::Cpu));
    let inputs = [noise(&[150, d_model], 1), noise(&[700, d_model], 2), targets];
    check_inputs(&inputs, [kind, kind], Rule::floor_of(kind), device)
}

/// Every third target is ignored; the first is not.
fn targets(n_tokens: i64, vocab_size: i64) -> Tensor {
    let ignored = Tensor::arange(n_tokens, (Kind::Int64, Device::Cpu)).remainder(3).eq(2);
    let ids = ((noise(&[n_tokens], 3) + 1.) * (0.5 * vocab_size as f64)).to_kind(Kind::Int64).clamp(0, vocab_size - 1);
    ids.masked_fill(&ignored, IGNORED)
}

/// Where only one gradient is wanted, it is the one found together with the other.
fn one_gradient(d_model: i64, kind: Kind, device: Device) -> Result<String> {
    let on = |t: Tensor| t.to_kind(kind).to_device(device);
    let (x, weight, targets) =
        (on(noise(&[40, d_model], 4)), on(noise(&[90, d_model], 5)), targets(40, 90).to_device(device));
    let grads = |wanted: [bool; 2]| -> Result<[Tensor; 2]> {
        let leaf = |t: &Tensor, wanted| t.detach().set_requires_grad(wanted);
        let leaves = [leaf(&x, wanted[0]), leaf(&weight, wanted[1])];
        (linear_cross_entropy(&leaves[0], &leaves[1], &targets, IGNORED)? * 0.25).f_backward()?;
        Ok(leaves.map(|leaf| leaf.grad()))
    };
    let both = grads([true, true])?;
    expect(same_bits(&grads([true, false])?[0], &both[0]), "the gradient of x depends on that of the weight")?;
    expect(same_bits(&grads([false, true])?[1], &both[1]), "the gradient of the weight depends on that of x")?;
    Ok("the same bits".to_owned())
}

/// A weight gives what its master as a tensor gives, and the gradient goes to the master; on CUDA the copy that it keeps is what is read.
fn bf16_copy(d_model: i64, device: Device) -> Result<String> {
    let on = |shape: &[i64], seed, kind| noise(shape, seed).to_kind(kind).to_device(device);
    let (x, targets) = (on(&[70, d_model], 4, Kind::BFloat16), targets(70, 90).to_device(device));
    let results = |matrix: HeadMatrix, master: &Tensor| -> Result<[Tensor; 4]> {
        let x = x.detach().set_requires_grad(true);
        let loss = linear_cross_entropy(&x, matrix, &targets, IGNORED)?;
        loss.f_backward()?;
        Ok([loss.detach(), x.grad(), master.grad(), token_losses(&x, matrix, &targets, IGNORED)?])
    };
    let master = || on(&[90, d_model], 5, Kind::Float).set_requires_grad(true);
    let (tensor, weight) = (master(), Weight::new(master()));
    weight.want_bf16_copy();
    weight.refresh_bf16_copy()?;
    let want = results((&tensor).into(), &tensor)?;
    let got = results((&weight).into(), weight.master())?;
    expect(want.iter().zip(&got).all(|(want, got)| same_bits(want, got)), "a weight is not as its master")?;
    expect(got[2].kind() == Kind::Float, "the gradient of the weight is not in f32")?;
    if device == Device::Cpu {
        return Ok("the same bits".to_owned());
    }
    let _ = tch::no_grad(|| weight.bf16())?.zero_();
    let loss = token_losses(&x, &weight, &targets, IGNORED)?.max().double_value(&[]);
    expect((loss - 90_f64.ln()).abs() < 1e-5, "the copy is not what the products take")?;
    Ok("the same bits, from the copy".to_owned())
}

/// Chunks of other sizes give the same gradients up to rounding, also where the weight's is bf16. On a CPU, whose chunks nobody chooses,
/// both cases are the same.
fn bf16_grad(d_model: i64, logits_bytes: u64, device: Device) -> Result<String> {
    let (n_tokens, vocab_size) = (700, 300);
    let on = |shape: &[i64], seed, kind| noise(shape, seed).to_kind(kind).to_device(device);
    let (x, targets) = (on(&[n_tokens, d_model], 4, Kind::BFloat16), targets(n_tokens, vocab_size).to_device(device));
    let weight = Weight::new(on(&[vocab_size, d_model], 5, Kind::Float).set_requires_grad(true));
    let results = |logits_bytes: u64| -> Result<[Tensor; 3]> {
        weight.clear_grad()?;
        let x = x.detach().set_requires_grad(true);
        let loss = linear_cross_entropy_within(&x, &weight, &targets, IGNORED, logits_bytes)?;
        loss.f_backward()?;
        let dweight =
            weight.grad()?.ok_or_else(|| Error::invalid("linear_cross_entropy", "the weight has no gradient"))?;
        Ok([loss.detach(), x.grad(), dweight])
    };
    let want = results(LOGITS_BYTES)?;
    weight.use_bf16_grad()?;
    let got = results(logits_bytes)?;
    expect(want[2].kind() == Kind::Float && got[2].kind() == Kind::BFloat16, "the gradient's type is another")?;
    let mut errors = Vec::new();
    for (want, got) in want.iter().zip(&got) {
        let (want, got) = (want.to_kind(Kind::Double), got.to_kind(Kind::Double));
        errors.push(((&got - &want).abs().max() / want.abs().max()).double_value(&[]));
    }
    expect(errors[0] < 1e-6 && errors[1..].iter().all(|&error| error < 1. / 128.), &format!("off by {errors:?}"))?;
    Ok(format!("off by {:.1e} (loss), {:.1e} (x), {:.1e} (weight)", errors[0], errors[1], errors[2]))
}

/// Several chunks of logits.
fn replays(d_model: i64, kind: Kind, device: Device) -> Result<String> {
    let (n_tokens, vocab_size) = (700, 300);
    let loss = |t: &[Tensor]| Ok(vec![linear_cross_entropy_within(&t[0], &t[1], &t[2], IGNORED, 1 << 16)?]);
    let inputs = [noise(&[n_tokens, d_model], 1), noise(&[vocab_size, d_model], 2) * 2., targets(n_tokens, vocab_size)];
    check_replay(&loss, &inputs, &[kind, Kind::Float, kind], device)
}

fn all_ignored(d_model: i64, kind: Kind, device: Device) -> Result<String> {
    let leaf = |shape: &[i64], seed| noise(shape, seed).to_kind(kind).to_device(device).set_requires_grad(true);
    let (x, weight) = (leaf(&[5, d_model], 6), leaf(&[11, d_model], 7));
    let targets = Tensor::full([5], IGNORED, (Kind::Int64, device));
    let loss = linear_cross_entropy(&x, &weight, &targets, IGNORED)?;
    loss.f_backward()?;
    for t in [&loss, &x.grad(), &weight.grad()] {
        expect(t.count_nonzero(None::<i64>).int64_value(&[]) == 0, "the loss or a gradient is not 0")?;
    }
    Ok("all zero".to_owned())
}

/// On the CPU an error that names it; on CUDA, which reports nothing without waiting, NaN.
fn outside(d_model: i64, kind: Kind, device: Device) -> Result<String> {
    let on = |shape: &[i64], seed| noise(shape, seed).to_kind(kind).to_device(device);
    let (x, weight) = (on(&[3, d_model], 8), on(&[11, d_model], 9));
    let targets = Tensor::from_slice(&[4i64, 11, 2]).to_device(device);
    match linear_cross_entropy(&x.set_requires_grad(true), &weight, &targets, IGNORED) {
        Ok(loss) => expect(device != Device::Cpu && loss.double_value(&[]).is_nan(), "the loss is not NaN")?,
        Err(error) => expect(error.to_string().contains("targets_t[1] is 11"), &error.to_string())?,
    }
    Ok(if device == Device::Cpu { "an error" } else { "NaN" }.to_owned())
}

fn check_token_losses(d_model: i64, kind: Kind, device: Device) -> Result<String> {
    let inputs = [noise(&[130, d_model], 10), noise(&[1003, d_model], 11) * 2., targets(130, 1003)];
    let plain = |t: &[Tensor]| Ok(vec![tch::no_grad(|| reference::token_losses(&t[0], &t[1], &t[2], IGNORED))]);
    let kernel = |t: &[Tensor]| Ok(vec![token_losses(&t[0], &t[1], &t[2], IGNORED)?]);
    Rule { kernel: &kernel, plain: &plain, floor: Rule::floor_of(kind) }.check(&inputs, &[kind; 3], device)
}

fn expect(holds: bool, otherwise: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::invalid("linear_cross_entropy", otherwise)) }
}
