//! The LM head with its cross-entropy against the formula.

use flowhn_torch::testing::{Case, Rule, noise, same_bits};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::{linear_cross_entropy, reference, token_losses};

const IGNORED: i64 = -100;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [Kind::Float, Kind::BFloat16] {
        for vocab_size in [1, 7, 1000, 50_257] {
            for n_tokens in [1, 31, 1000] {
                // The widest vocabulary with few tokens only: the reference keeps all logits, in double precision.
                if vocab_size < 50_257 || n_tokens < 1000 {
                    let name =
                        format!("linear_cross_entropy: {kind:?}, {n_tokens} tokens x 24, vocabulary of {vocab_size}");
                    cases.push(Case::new(name, move |device| check(n_tokens, 24, vocab_size, kind, device)));
                }
            }
        }
        cases.push(Case::new(format!("linear_cross_entropy: {kind:?}, several chunks"), move |device| {
            // On the CPU a chunk has 64 rows of this vocabulary, on CUDA 2048 or 4096.
            let n_tokens = if device == Device::Cpu { 150 } else { 4200 };
            check(n_tokens, 8, 65_536, kind, device)
        }));
        cases.push(Case::new(format!("linear_cross_entropy: {kind:?}, rows longer than registers"), move |device| {
            check(5, 8, 100_003, kind, device)
        }));
        cases.push(Case::new(format!("linear_cross_entropy: {kind:?}, one gradient only"), move |device| {
            one_gradient(kind, device)
        }));
        cases.push(Case::new(format!("linear_cross_entropy: {kind:?}, every target ignored"), move |device| {
            all_ignored(kind, device)
        }));
        cases.push(Case::new(
            format!("linear_cross_entropy: {kind:?}, a target outside the vocabulary"),
            move |device| outside(kind, device),
        ));
        cases.push(Case::new(format!("token_losses: {kind:?}"), move |device| check_token_losses(kind, device)));
    }
    let name = "linear_cross_entropy: BFloat16, weight in f32";
    cases.push(Case::new(name, |device| check_kinds(70, 24, 300, [Kind::BFloat16, Kind::Float], device)));
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
    let plain =
        |t: &[Tensor]| Ok(vec![reference::linear_cross_entropy(&t[0], &t[1].to_kind(t[0].kind()), &t[2], IGNORED)]);
    let kernel = |t: &[Tensor]| Ok(vec![linear_cross_entropy(&t[0], &t[1], &t[2], IGNORED)?]);
    let rule = Rule { kernel: &kernel, plain: &plain, floor: Rule::floor_of(kind) };
    rule.check(&inputs, &[kind, weight_kind, kind], device)
}

/// Every third target is ignored; the first is not.
fn targets(n_tokens: i64, vocab_size: i64) -> Tensor {
    let ignored = Tensor::arange(n_tokens, (Kind::Int64, Device::Cpu)).remainder(3).eq(2);
    let ids = ((noise(&[n_tokens], 3) + 1.) * (0.5 * vocab_size as f64)).to_kind(Kind::Int64).clamp(0, vocab_size - 1);
    ids.masked_fill(&ignored, IGNORED)
}

/// Where only one gradient is wanted, it is the one found together with the other.
fn one_gradient(kind: Kind, device: Device) -> Result<String> {
    let on = |t: Tensor| t.to_kind(kind).to_device(device);
    let (x, weight, targets) = (on(noise(&[40, 16], 4)), on(noise(&[90, 16], 5)), targets(40, 90).to_device(device));
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

fn all_ignored(kind: Kind, device: Device) -> Result<String> {
    let leaf = |shape: &[i64], seed| noise(shape, seed).to_kind(kind).to_device(device).set_requires_grad(true);
    let (x, weight) = (leaf(&[5, 8], 6), leaf(&[11, 8], 7));
    let targets = Tensor::full([5], IGNORED, (Kind::Int64, device));
    let loss = linear_cross_entropy(&x, &weight, &targets, IGNORED)?;
    loss.f_backward()?;
    for t in [&loss, &x.grad(), &weight.grad()] {
        expect(t.count_nonzero(None::<i64>).int64_value(&[]) == 0, "the loss or a gradient is not 0")?;
    }
    Ok("all zero".to_owned())
}

/// On the CPU an error that names it; on CUDA, which reports nothing without waiting, NaN.
fn outside(kind: Kind, device: Device) -> Result<String> {
    let (x, weight) =
        (noise(&[3, 8], 8).to_kind(kind).to_device(device), noise(&[11, 8], 9).to_kind(kind).to_device(device));
    let targets = Tensor::from_slice(&[4i64, 11, 2]).to_device(device);
    match linear_cross_entropy(&x.set_requires_grad(true), &weight, &targets, IGNORED) {
        Ok(loss) => expect(device != Device::Cpu && loss.double_value(&[]).is_nan(), "the loss is not NaN")?,
        Err(error) => expect(error.to_string().contains("targets_t[1] is 11"), &error.to_string())?,
    }
    Ok(if device == Device::Cpu { "an error" } else { "NaN" }.to_owned())
}

fn check_token_losses(kind: Kind, device: Device) -> Result<String> {
    let inputs = [noise(&[130, 16], 10), noise(&[1003, 16], 11) * 2., targets(130, 1003)];
    let plain = |t: &[Tensor]| Ok(vec![tch::no_grad(|| reference::token_losses(&t[0], &t[1], &t[2], IGNORED))]);
    let kernel = |t: &[Tensor]| Ok(vec![token_losses(&t[0], &t[1], &t[2], IGNORED)?]);
    Rule { kernel: &kernel, plain: &plain, floor: Rule::floor_of(kind) }.check(&inputs, &[kind; 3], device)
}

fn expect(holds: bool, otherwise: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::invalid("linear_cross_entropy", otherwise)) }
}
