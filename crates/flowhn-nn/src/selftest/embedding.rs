//! The embedding against the formula.

use flowhn_torch::testing::{Case, Rule, noise, same_bits};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::{embedding, reference};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [Kind::Float, Kind::BFloat16] {
        for (n_tokens, vocab_size, d_model) in [(1, 1, 1), (31, 7, 24), (1000, 50, 67), (3000, 1000, 40)] {
            for frequent in [false, true] {
                let often = if frequent { ", one id often" } else { "" };
                let name = format!("embedding: {kind:?}, {n_tokens} tokens of {vocab_size} x {d_model}{often}");
                cases.push(Case::new(name, move |device| check(n_tokens, vocab_size, d_model, frequent, kind, device)));
            }
        }
        cases.push(Case::new(format!("embedding: {kind:?}, padding"), move |device| padding(kind, device)));
        let name = format!("embedding: {kind:?}, an id outside the vocabulary");
        cases.push(Case::new(name, move |device| outside(kind, device)));
    }
    cases
}

fn check(n_tokens: i64, vocab_size: i64, d_model: i64, frequent: bool, kind: Kind, device: Device) -> Result<String> {
    let table = noise(&[vocab_size, d_model], 1);
    let ids = ids(n_tokens, vocab_size, frequent);
    let in_kind = |t: &[Tensor]| if t[0].kind() == Kind::Double { Kind::Double } else { kind };
    let plain = |t: &[Tensor]| Ok(vec![reference::embedding(&t[0], &t[1], in_kind(t))]);
    let kernel = |t: &[Tensor]| Ok(vec![embedding(&t[0], &t[1], in_kind(t), None)?]);
    Rule { kernel: &kernel, plain: &plain, floor: Rule::floor_of(kind) }.check(&[table, ids], &[Kind::Float; 2], device)
}

/// Ids in two rows where their number is even; if `frequent`, more than half of them are one.
fn ids(n_tokens: i64, vocab_size: i64, frequent: bool) -> Tensor {
    let ids = ((noise(&[n_tokens], 2) + 1.) * (0.5 * vocab_size as f64)).to_kind(Kind::Int64).clamp(0, vocab_size - 1);
    let ids = if frequent { ids.masked_fill(&noise(&[n_tokens], 3).lt(0.2), vocab_size / 2) } else { ids };
    if n_tokens % 2 == 0 { ids.view([2, n_tokens / 2]) } else { ids }
}

/// The padding row is looked up like any other and gets no gradient; the others get what they get without it.
fn padding(kind: Kind, device: Device) -> Result<String> {
    let table = noise(&[20, 12], 4).to_kind(Kind::Float).to_device(device);
    let ids = ids(200, 20, true).to_device(device);
    let weights = noise(&[2, 100, 12], 5).to_kind(kind).to_device(device);
    let run = |padding_idx| -> Result<[Tensor; 2]> {
        let table = table.detach().set_requires_grad(true);
        let x = embedding(&table, &ids, kind, padding_idx)?;
        (&x * &weights).sum(Kind::Float).f_backward()?;
        Ok([x.detach(), table.grad()])
    };
    let ([x, grad], [padded_x, padded_grad]) = (run(None)?, run(Some(10))?);
    expect(same_bits(&x, &padded_x), "the padding row is looked up differently")?;
    let row = Tensor::from_slice(&[10i64]).to_device(device);
    expect(same_bits(&padded_grad, &grad.index_fill(0, &row, 0.)), "a gradient is not as expected")?;
    expect(grad.select(0, 10).abs().sum(Kind::Float).double_value(&[]) > 0., "the row had no gradient to lose")?;
    Ok("no gradient for its row".to_owned())
}

/// On the CPU an error that names it; on CUDA, which reports nothing without waiting, a row of NaN and no gradient.
fn outside(kind: Kind, device: Device) -> Result<String> {
    let table = noise(&[6, 8], 6).to_kind(Kind::Float).to_device(device).set_requires_grad(true);
    let ids = Tensor::from_slice(&[1i64, 6, -1, 1 << 32, 2]).to_device(device);
    match embedding(&table, &ids, kind, None) {
        Ok(x) => {
            let is_nan = Vec::<bool>::try_from(x.isnan().all_dim(1, false).to_device(Device::Cpu))?;
            expect(device != Device::Cpu && is_nan == [false, true, true, true, false], "the wrong rows are NaN")?;
            x.sum(Kind::Float).f_backward()?;
            let sums =
                Vec::<f64>::try_from(table.grad().sum_dim_intlist(1, false, Kind::Double).to_device(Device::Cpu))?;
            expect(sums == [0., 8., 8., 0., 0., 0.], &format!("the gradients of the rows add up to {sums:?}"))?;
        }
        Err(error) => expect(error.to_string().contains("ids[1] is 6"), &error.to_string())?,
    }
    Ok(if device == Device::Cpu { "an error" } else { "NaN" }.to_owned())
}

fn expect(holds: bool, otherwise: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::invalid("embedding", otherwise)) }
}
