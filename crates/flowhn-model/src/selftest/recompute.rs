//! Blocks that are recomputed change no bit of loss and gradients, and save memory.

use flowhn_torch::MemoryStats;
use flowhn_torch::testing::{Case, same_bits};
use tch::{Device, Kind, Tensor};

use super::small::{POLICIES, SEQ_LEN, VARIANTS, ids};
use super::{case, ensure, rows};
use crate::{Branches, Model, RecomputeEvery, Result};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for variant in VARIANTS {
        let name = format!("recompute: {} keeps its bits", variant.name());
        cases.push(case(name, move |device| {
            for split in POLICIES {
                let model = &mut variant.model(split, device)?;
                let bits = match [POLICIES[0], POLICIES[9]].contains(&split) {
                    true => keeps_its_bits(model),
                    false => agrees(model, &[1]),
                };
                bits.map_err(|error| crate::Error::Input(format!("{split}: {error}")))?;
            }
            Ok(format!("{} policies", POLICIES.len()))
        }));
    }
    for (name, section) in rows::ROWS {
        cases.push(case(format!("recompute: {name} keeps its bits"), move |device| {
            keeps_its_bits(&mut rows::model(section, device)?)?;
            Ok(String::new())
        }));
    }
    cases.push(Case::on_cuda("recompute: memory of all blocks and of none", |device| {
        saves_memory(device).map_err(|error| flowhn_torch::Error::invalid("recompute", error.to_string()))
    }));
    cases
}

/// The losses of two shares and the gradients that they leave, by name.
fn gradients(model: &mut Model, every: usize) -> Result<Vec<(String, Tensor)>> {
    model.set_recompute_every(RecomputeEvery(every));
    let device = model.device();
    model.params().zero_grad()?;
    // Learned tokens go with one document a sequence.
    let segments = Tensor::arange(SEQ_LEN as i64, (Kind::Int64, device)).floor_divide_scalar(19).repeat([2, 1]);
    let segments = (model.config().options.n_meta == 0).then_some(segments);
    let mut all = Vec::new();
    for share in 0..2 {
        let targets = ids(2, SEQ_LEN, 8 + share, device);
        let _ = targets.narrow(1, 7, 3).fill_(crate::IGNORE_INDEX);
        let loss = model.backward(&ids(2, SEQ_LEN, 6 + share, device), &targets, segments.as_ref(), 2)?;
        ensure(!loss.requires_grad(), || "the loss has a history".to_owned())?;
        all.push((format!("loss {share}"), loss));
    }
    for param in model.params().iter() {
        let grad = param.weight.master().grad();
        let grad = if grad.defined() { grad } else { param.weight.master().detach().zeros_like() };
        all.push((param.name.clone(), grad.copy()));
    }
    Ok(all)
}

/// In f32 and bf16, every block, every second and every third, and on a GPU with branches beside each other.
fn keeps_its_bits(model: &mut Model) -> Result<()> {
    let beside = model.device().is_cuda().then_some(Branches::Streams);
    for kind in [Kind::Float, Kind::BFloat16] {
        model.set_compute_kind(kind);
        for branches in std::iter::once(Branches::Serial).chain(beside) {
            model.set_branches(branches)?;
            agrees(model, &[1, 2, 3])
                .map_err(|error| crate::Error::Input(format!("{kind:?}, {branches:?}: {error}")))?;
        }
    }
    Ok(())
}

/// An error that names what differs from the bits of kept activations.
fn agrees(model: &mut Model, every: &[usize]) -> Result<()> {
    let want = gradients(model, 0)?;
    for &every in every {
        for ((name, got), (_, want)) in gradients(model, every)?.iter().zip(&want) {
            ensure(same_bits(got, want), || format!("every {every}: {name} is not that of kept activations"))?;
        }
    }
    Ok(())
}

/// The peak of all blocks recomputed, one at a time, is well below that of all kept.
fn saves_memory(device: Device) -> Result<String> {
    let Device::Cuda(device_idx) = device else { return Ok(String::new()) };
    let mut model = VARIANTS[0].model(POLICIES[0], device)?;
    let ids = ids(64, SEQ_LEN, 6, device);
    let mut peak = |every| -> Result<u64> {
        model.set_recompute_every(RecomputeEvery(every));
        let mut above = 0;
        // The first pass makes what all later ones share.
        for _ in 0..2 {
            let before = MemoryStats::of(device_idx)?.allocated_bytes;
            MemoryStats::reset_peak(device_idx)?;
            let _loss = model.backward(&ids, &ids, None, 1)?;
            above = MemoryStats::of(device_idx)?.allocated_peak_bytes.saturating_sub(before);
        }
        Ok(above)
    };
    let (kept, recomputed) = (peak(0)?, peak(1)?);
    ensure(recomputed < kept * 6 / 10, || format!("{recomputed} bytes with recomputed blocks, {kept} without"))?;
    Ok(format!("{} kB, {} kB without", recomputed / 1000, kept / 1000))
}
