//! Prefill and token-by-token decoding give the logits of the whole sequence.

use flowhn_torch::testing::{Case, same_bits};
use tch::{Device, Kind, Tensor, no_grad};

use super::small::{POLICIES, SEQ_LEN, VARIANTS, Variant, ids};
use super::{case, case_on_cuda, ensure, max_abs, max_rel};
use crate::{Error, Model, Result, StepLaunch};

/// Most that a logit may differ in f32, relative to the largest.
const MAX_REL: f64 = 1e-4;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for variant in VARIANTS {
        let name = |kind: &str| format!("decode: {} {kind}", variant.name());
        cases.push(case(name("Float"), move |device| policies_equal_the_full_forward(&variant, device)));
        cases.push(case(name("BFloat16"), move |device| is_as_exact_as_the_full_forward(&variant, device)));
        let name = format!("decode: {} gives equal bits as CUDA graphs and operator by operator", variant.name());
        cases.push(case_on_cuda(name, move |device| graphs_change_no_bit(&variant, device)));
    }
    cases.push(case("decode: a prompt in pieces equals the prompt at once".to_owned(), pieces));
    cases
}

/// Decodes with a prompt of `prompt` tokens and the rest one by one.
fn decoded(model: &Model, ids: &Tensor, prompt: usize) -> Result<Tensor> {
    let (batch, len) = (ids.size()[0], ids.size()[1]);
    let mut decoder = model.decoder(batch as usize)?;
    let mut logits = vec![decoder.feed_all(&ids.narrow(1, 0, prompt as i64))?];
    for pos in prompt as i64..len {
        logits.push(decoder.feed_all(&ids.narrow(1, pos, 1))?);
    }
    ensure(decoder.position() as i64 == len, || format!("the decoder is at {} of {len}", decoder.position()))?;
    Ok(Tensor::cat(&logits, 1))
}

/// Past the training length, where plans repeat.
pub(super) fn long_ids(device: Device) -> Tensor {
    ids(2, SEQ_LEN + 20, 3, device)
}

fn policies_equal_the_full_forward(variant: &Variant, device: Device) -> Result<String> {
    let mut worst = 0f64;
    for split in POLICIES {
        let model = variant.model(split, device)?;
        let named = |error| Error::Input(format!("{split}: {error}"));
        worst = worst.max(equals_the_full_forward(&model, &long_ids(device)).map_err(named)?);
    }
    Ok(format!("{} policies, {worst:.0e}", POLICIES.len()))
}

/// The largest error of decoding with prompts of several lengths.
pub(super) fn equals_the_full_forward(model: &Model, ids: &Tensor) -> Result<f64> {
    let want = no_grad(|| model.logits(ids, None))?;
    let mut worst = 0f64;
    for prompt in [1, 17, SEQ_LEN - 1, SEQ_LEN + 7] {
        let error = max_rel(&decoded(model, ids, prompt)?, &want)?;
        ensure(error <= MAX_REL, || format!("prompt {prompt}: off by {error:.2e}"))?;
        worst = worst.max(error);
    }
    Ok(worst)
}

fn graphs_change_no_bit(variant: &Variant, device: Device) -> Result<String> {
    for split in POLICIES {
        let mut model = variant.model(split, device)?;
        for kind in [Kind::Float, Kind::BFloat16] {
            model.set_compute_kind(kind);
            let named = |error| Error::Input(format!("{split}, {kind:?}: {error}"));
            launches_agree(&model).map_err(named)?;
        }
    }
    Ok(format!("{} policies", POLICIES.len()))
}

/// Single tokens past the first room of the caches, with two pieces between them: states and keys then change outside of graphs.
pub(super) fn launches_agree(model: &Model) -> Result<()> {
    // The products of one sequence and of more go different ways.
    let batch = if model.compute_kind() == Kind::BFloat16 { 1 } else { 2 };
    let ids = ids(batch, 90, 4, model.device());
    let logits = |launch| -> Result<Tensor> {
        let mut decoder = model.decoder(batch as usize)?;
        decoder.set_step_launch(launch);
        let pieces = [vec![9], vec![1; 21], vec![3], vec![1; 36], vec![2], vec![1; 19]].concat();
        let mut start = 0;
        let mut logits = Vec::new();
        for len in pieces {
            logits.push(decoder.feed_all(&ids.narrow(1, start, len))?);
            start += len;
        }
        ensure(start == 90, || format!("{start} tokens were fed"))?;
        Ok(Tensor::cat(&logits, 1))
    };
    let (graphs, operators) = (logits(StepLaunch::Graph)?, logits(StepLaunch::Operators)?);
    ensure(same_bits(&graphs, &operators), || {
        let off = max_abs(&(graphs.to_kind(Kind::Double) - operators.to_kind(Kind::Double)));
        format!("graphs are off from operators by {off:.2e}")
    })
}

/// In bf16 the two round differently; decoding may lose at most twice what the whole sequence loses against f32.
fn is_as_exact_as_the_full_forward(variant: &Variant, device: Device) -> Result<String> {
    let policies = [POLICIES[0], POLICIES[9]];
    for split in policies {
        let mut model = variant.model(split, device)?;
        let ids = long_ids(device);
        let exact = no_grad(|| model.logits(&ids, None))?;
        model.set_compute_kind(Kind::BFloat16);
        let whole = no_grad(|| model.logits(&ids, None))?;
        let pieces = decoded(&model, &ids, 17)?;
        let [whole, pieces] = [whole, pieces].map(|logits| max_abs(&(logits.to_kind(Kind::Float) - &exact)));
        let allowed = 2. * whole + 1e-2 * max_abs(&exact);
        ensure(pieces <= allowed, || {
            format!("{split}: off by {pieces:.2e}, allowed {allowed:.2e} ({whole:.2e} at once)")
        })?;
    }
    Ok(format!("{} policies", policies.len()))
}

fn pieces(device: Device) -> Result<String> {
    let variant = Variant { block: "flow", mixer: "mamba1", attn: "rope = true" };
    let model = variant.model("policy = \"cyclic_split\"", device)?;
    let ids = ids(1, 40, 5, device);
    let mut decoder = model.decoder(1)?;
    let mut pieces = Vec::new();
    let mut start = 0;
    for len in [3, 1, 11, 2, 23] {
        pieces.push(decoder.feed_all(&ids.narrow(1, start, len))?);
        start += len;
    }
    let want = no_grad(|| model.logits(&ids, None))?;
    let error = max_rel(&Tensor::cat(&pieces, 1), &want)?;
    ensure(error <= MAX_REL, || format!("off by {error:.2e}"))?;
    match decoder.cache_bytes() {
        0 => Err(Error::Input("the decoder remembers nothing".to_owned())),
        n_bytes => Ok(format!("{n_bytes} bytes of cache")),
    }
}
