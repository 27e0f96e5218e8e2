//! What a token cannot see does not move its logits by a single bit.

use flowhn_torch::testing::Case;
use tch::{Device, Kind, Tensor, no_grad};

use super::small::{POLICIES, SEQ_LEN, VARIANTS, VOCAB, Variant, ids};
use super::{case, ensure, max_rel};
use crate::{Input, Model, Result};

/// The policies that bf16 is tried with: one span a branch, many spans, all in both.
const FEW: [&str; 3] = [POLICIES[5], POLICIES[9], POLICIES[0]];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for variant in VARIANTS {
        for kind in [Kind::Float, Kind::BFloat16] {
            let policies: &'static [&str] = if kind == Kind::Float { &POLICIES } else { &FEW };
            let each = move |check: fn(&Model, Device) -> Result<()>, device: Device| {
                for split in policies {
                    let mut model = variant.model(split, device)?;
                    model.set_compute_kind(kind);
                    let named = |error| crate::Error::Input(format!("{}: {error}", split.replace('\n', ", ")));
                    check(&model, device).map_err(named)?;
                }
                Ok(format!("{} policies", policies.len()))
            };
            let name = |what: &str| format!("{what}: {} {kind:?}", Variant::name(&variant));
            cases.push(case(name("causality"), move |device| each(later_tokens_do_not_matter, device)));
            cases.push(case(name("packing"), move |device| each(documents_do_not_matter, device)));
        }
    }
    cases
}

pub(super) fn later_tokens_do_not_matter(model: &Model, device: Device) -> Result<()> {
    let before = ids(2, SEQ_LEN, 1, device);
    let want = no_grad(|| model.logits(&before, None))?;
    for pos in [1, 16, 30, SEQ_LEN as i64 - 1] {
        let after = before.copy();
        let changed = (after.narrow(1, pos, 1) + 1).remainder(VOCAB);
        after.narrow(1, pos, 1).copy_(&changed);
        let got = no_grad(|| model.logits(&after, None))?;
        let same = got.narrow(1, 0, pos).equal(&want.narrow(1, 0, pos));
        ensure(same, || format!("token {pos} moved an earlier logit"))?;
        ensure(!got.narrow(1, pos, 1).equal(&want.narrow(1, pos, 1)), || format!("token {pos} moved nothing"))?;
    }
    Ok(())
}

pub(super) fn documents_do_not_matter(model: &Model, device: Device) -> Result<()> {
    let lengths = [13i64, 1, 20, 11];
    let documents = (0i64..).zip(lengths).map(|(i, n)| Tensor::full([n], i, (Kind::Int64, device)));
    let segments = Tensor::cat(&documents.collect::<Vec<_>>(), 0).unsqueeze(0);
    let pack = ids(1, SEQ_LEN, 9, device);
    let want = no_grad(|| model.logits(&pack, Some(&segments)))?;
    // Pieces of other lengths are summed in another order; bf16 rounds each sum.
    let tolerance = if want.kind() == Kind::Float { 1e-5 } else { 3e-2 };
    let mut start = 0;
    for len in lengths {
        let alone = pack.narrow(1, start, len);
        let got = no_grad(|| model.forward(&Input::new(&alone).at(start as usize)))?.logits;
        let error = max_rel(&got, &want.narrow(1, start, len))?;
        ensure(error <= tolerance, || format!("the document at {start} differs by {error:.2e} when it is alone"))?;
        start += len;
    }
    // Other documents around the third change none of its bits.
    let other = ids(1, SEQ_LEN, 4, device);
    other.narrow(1, 14, 20).copy_(&pack.narrow(1, 14, 20));
    let moved = no_grad(|| model.logits(&other, Some(&segments)))?;
    let (moved, want) = (moved.narrow(1, 14, 20), want.narrow(1, 14, 20));
    let error = max_rel(&moved, &want)?;
    ensure(error == 0., || format!("other documents moved logits by {error:.2e}"))
}
