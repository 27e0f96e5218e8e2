//! Long sequences, and tensors of more than 2^31 elements.

use flowhn_torch::testing::{Case, Outcome, Rule, noise, same_bits};
use flowhn_torch::{Error, Result};
use tch::{Device, Kind, Tensor};

use super::attention::formula;
use crate::{Mask, attention};

/// Query heads, key heads, width of a head.
const HEADS: [i64; 3] = [4, 2, 64];
/// Neighbours that are looked at, at the start, in the middle and at the end.
const N_SHOWN: i64 = 40;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (batch, n) in [(1, 4096), (8, 4096), (1, 65_536)] {
        for document_len in [None, Some(1500)] {
            let what = document_len.map_or_else(String::new, |len| format!(", documents of {len}"));
            let batches = if batch > 1 { format!("batch {batch}, ") } else { String::new() };
            let name = format!("attention: {batches}{n} tokens{what}, some queries against the formula");
            cases.push(Case::on_cuda(name, move |device| long([batch, n], document_len, device)));
        }
    }
    cases.push(Case::on_cuda("attention: more than 2^31 elements", huge).alone());
    cases
}

/// The rule for some queries of a long sequence: what the others find does not count, and so the gradients follow from these alone.
fn long([batch, n]: [i64; 2], document_len: Option<i64>, device: Device) -> Result<String> {
    let [heads, kv_heads, width] = HEADS;
    let part = |heads, seed| noise(&[batch, n, heads + 1, width], seed).narrow(2, 1, heads) * 2.;
    let inputs = [part(heads, 1), part(kv_heads, 2), part(kv_heads, 3)];
    let shown = |x: &Tensor| {
        let starts = [0, n / 2 - N_SHOWN / 2, n - N_SHOWN];
        Tensor::cat(&starts.map(|start| x.narrow(1, start, N_SHOWN)), 1)
    };
    let positions = Tensor::arange(n, (Kind::Int64, device)).unsqueeze(0);
    let segments = positions.floor_divide_scalar(document_len.unwrap_or(n));
    let all_segments = segments.repeat([batch, 1]);
    let (q_positions, q_segments) = (shown(&positions).unsqueeze(2), shown(&segments).unsqueeze(2));
    let visible =
        positions.unsqueeze(1).le_tensor(&q_positions).logical_and(&segments.unsqueeze(1).eq_tensor(&q_segments));
    let visible = visible.unsqueeze(1);
    let mask = match document_len {
        Some(_) => Mask::causal().with_documents(&all_segments),
        None => Mask::causal(),
    };
    let kernel = |x: &[Tensor]| Ok(vec![shown(&attention(&x[0], &x[1], &x[2], &mask)?)]);
    let plain = |x: &[Tensor]| Ok(vec![formula(&shown(&x[0]), &x[1], &x[2], &visible)]);
    Rule { kernel: &kernel, plain: &plain, floor: Rule::floor_of(Kind::BFloat16) }.check_at_scale(
        1.,
        &inputs,
        &[Kind::BFloat16; 3],
        device,
    )
}

/// Offsets past 2^31: the last sequence of a large batch against the same sequence alone.
fn huge(device: Device) -> Result<Outcome> {
    const NEEDED_BYTES: u64 = 48 << 30;
    if let Some(not_run) = Outcome::without_room(device, NEEDED_BYTES)? {
        return Ok(not_run);
    }
    tch::manual_seed(1);
    let (batch, n, heads, kv_heads, width) = (1026, 512, 64, 2, 64);
    let make = |heads: i64| {
        let values = Tensor::empty([batch, n, heads, width], (Kind::BFloat16, device)).uniform_(-1., 1.);
        values.set_requires_grad(true)
    };
    let whole = [heads, kv_heads, kv_heads].map(make);
    let last = whole.each_ref().map(|x| x.detach().narrow(0, batch - 1, 1).copy().set_requires_grad(true));
    let run = |x: &[Tensor; 3]| -> Result<Tensor> {
        let o = attention(&x[0], &x[1], &x[2], &Mask::causal())?;
        // The gradient of the sum of squares depends on the output.
        (&o * o.detach()).sum(Kind::Float).f_backward()?;
        Ok(o.detach())
    };
    let (o, o_last) = (run(&whole)?, run(&last)?);
    if o.numel() <= 1 << 31 {
        return Err(Error::invalid("huge", format!("only {} elements", o.numel())));
    }
    let ends = |x: &Tensor| x.narrow(0, batch - 1, 1);
    let mut pairs = vec![("the output", ends(&o), o_last)];
    for (name, (x, x_last)) in ["dq", "dk", "dv"].into_iter().zip(whole.iter().zip(&last)) {
        pairs.push((name, ends(&x.grad()), x_last.grad()));
    }
    match pairs.iter().find(|(_, got, want)| !same_bits(got, want)) {
        Some((name, ..)) => {
            Err(Error::invalid("huge", format!("{name} of the last sequence differs from the same alone")))
        }
        None => Ok(format!("{} elements, the last sequence has the same bits alone", o.numel()).into()),
    }
}
