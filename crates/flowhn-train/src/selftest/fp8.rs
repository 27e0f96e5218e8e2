//! Training with projections in fp8: as good as in bf16 on a small model, and resumed to the bit.

use flowhn_torch::testing::Case;
use tch::Device;

use super::small::{self, Small};
use super::{ensure, on, resumes, told};
use crate::Result;
use crate::metrics::{StepRecord, read};
use crate::run_dir::METRICS;

/// Both sizes of most projections are multiples of 16.
const FP8: [&str; 2] = ["train.dtype=bf16", "train.linears=fp8"];

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("train: losses in fp8 are near those in bf16", |device| told(near_bf16(device))),
        Case::new("train: stopped and resumed equals never having stopped, fp8", |device| {
            told(resumes(&FP8, &[20, 17, 1], device))
        }),
    ]
}

/// The mean loss of the last ten of sixty steps, fp8 against bf16.
fn near_bf16(device: Device) -> Result<String> {
    /// Most that the means may differ, relative.
    const MAX_REL: f64 = 0.02;
    let small = Small::new()?;
    let mean = |name: &str, sets: &[&str]| -> Result<f64> {
        let sets: Vec<&str> = sets.iter().copied().chain(["train.steps=60", "train.eval_every=0"]).collect();
        let (trainer, _) = small::sit(&small.config(name, &sets)?, &on(device))?;
        let records: Vec<StepRecord> = read(&trainer.run_dir().join(METRICS))?;
        let in_fp8 = trainer.model().fp8_projections();
        ensure((in_fp8.n_fp8 > 0) == (name == "fp8"), || format!("{name}: {in_fp8:?}"))?;
        Ok(records.iter().rev().take(10).map(|record| f64::from(record.loss)).sum::<f64>() / 10.)
    };
    let (got, want) = (mean("fp8", &FP8)?, mean("bf16", &FP8[..1])?);
    let error = (got / want - 1.).abs();
    ensure(error <= MAX_REL, || format!("{got:.4} nats in fp8, {want:.4} in bf16"))?;
    Ok(format!("{got:.4} nats, {want:.4} in bf16"))
}
