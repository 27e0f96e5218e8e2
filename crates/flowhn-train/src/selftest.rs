//! Checks that run on any device: the optimiser follows its formula, a tiny model learns, and an interrupted run ends as one that
//! was not.

mod adamw;
mod fp8;
mod graph;
pub mod small;

use flowhn_torch::testing::Case;
use tch::Device;

use crate::metrics::{StepRecord, read};
use crate::run_dir::{METRICS, Start};
use crate::{Error, Outcome, Result, TrainOptions};
use small::{Ending, Small};

/// Every check of this crate.
pub fn cases() -> Vec<Case> {
    let mut cases = vec![Case::on_cuda("train: losses are those of the CPU", |device| told(losses_of_the_cpu(device)))];
    // On a checkpoint; between checkpoints; between two readings of losses; right after a validation; after the first step.
    const PLACES: &[u64] = &[20, 17, 23, 15, 1];
    let variants: [(&str, &'static [&'static str], &'static [u64]); 6] = [
        ("fp32", &["train.dtype=fp32"], PLACES),
        ("bf16", &["train.dtype=bf16"], &[17]),
        ("gradients in bf16", &["train.dtype=bf16", "train.grads=bf16", "train.grad_accum=1"], &[17]),
        (
            "fp8, gradients in bf16",
            &["train.dtype=bf16", "train.linears=fp8", "train.grads=bf16", "train.grad_accum=1"],
            &[17],
        ),
        ("state in bf16", &["train.optim_state=bf16"], &[17]),
        ("state in int8", &["train.optim_state=int8"], &[17]),
    ];
    for (what, sets, places) in variants {
        let name = |claim: &str| format!("train: {claim}, {what}");
        cases.push(Case::new(name("a tiny model learns"), move |device| told(learns(sets, device))));
        let name = name("stopped and resumed equals never having stopped");
        cases.push(Case::new(name, move |device| told(resumes(sets, places, device))));
    }
    for dtype in ["train.dtype=fp32", "train.dtype=bf16"] {
        let name = format!("train: recomputed blocks change no bit, {dtype}");
        cases.push(Case::new(name, move |device| told(recomputes(dtype, device))));
    }
    cases.extend(fp8::cases());
    cases.extend(graph::cases());
    cases.extend(adamw::cases());
    cases
}

fn told(outcome: Result<String>) -> flowhn_torch::Result<String> {
    outcome.map_err(|error| flowhn_torch::Error::invalid("train", error.to_string()))
}

fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::from(flowhn_torch::Error::invalid("train", message()))) }
}

fn on(device: Device) -> TrainOptions {
    TrainOptions { device, ..TrainOptions::default() }
}

fn learns(sets: &[&str], device: Device) -> Result<String> {
    let small = Small::new()?;
    let config = small.config("learns", &[sets, &["train.steps=60", "train.eval_every=0"]].concat())?;
    let (_, outcome) = small::sit(&config, &on(device))?;
    let Outcome::Done(summary) = outcome else {
        return Err(flowhn_torch::Error::invalid("train", format!("{outcome:?}")).into());
    };
    let (got, unigram) = (summary.val_bits_per_byte, summary.unigram_bits_per_byte);
    ensure(got < 0.95 * unigram, || format!("{got:.3} bits/byte after 60 steps, unigram {unigram:.3}"))?;
    Ok(format!("{got:.3} bits/byte, unigram {unigram:.3}"))
}

fn resumes(sets: &[&str], places: &[u64], device: Device) -> Result<String> {
    let small = Small::new()?;
    let ending = |name: &str, sittings: &[TrainOptions]| -> Result<Ending> {
        let config = small.config(name, sets)?;
        let mut last = None;
        for options in sittings {
            // A directory has one trainer at a time.
            drop(last.take());
            last = Some(small::sit(&config, options)?.0);
        }
        let trainer = last.ok_or_else(|| flowhn_torch::Error::invalid("train", "no sitting"))?;
        Ending::of(&trainer)
    };
    let want = ending("whole", &[on(device)])?;
    for &at in places {
        let stopped = TrainOptions { stop_at: Some(at), ..on(device) };
        let resumed = TrainOptions { start: Start::Resume, ..on(device) };
        let got = ending(&format!("stop-{at}"), &[stopped, resumed])?;
        let difference = got.difference(&want);
        ensure(difference.is_none(), || {
            format!("stopped at step {at} and resumed: {} differs", difference.unwrap_or_default())
        })?;
    }
    Ok(format!("40 steps, stopped at {places:?}"))
}

/// Whole runs, on a GPU as captured steps.
fn recomputes(dtype: &'static str, device: Device) -> Result<String> {
    let small = Small::new()?;
    let ending = |every: usize| -> Result<Ending> {
        let every = format!("train.recompute_every={every}");
        let sets = [dtype, &every, "train.steps=12", "train.eval_every=0"];
        Ending::of(&small::sit(&small.config(&every, &sets)?, &on(device))?.0)
    };
    let want = ending(0)?;
    for every in [1, 2] {
        let difference = ending(every)?.difference(&want);
        ensure(difference.is_none(), || format!("every {every}: {} differs", difference.unwrap_or_default()))?;
    }
    Ok("12 steps, every block and every second".to_owned())
}

fn losses_of_the_cpu(device: Device) -> Result<String> {
    /// Most that two correct computations of the loss in f32 may drift apart in ten steps, relative.
    const MAX_REL: f64 = 1e-4;
    let small = Small::new()?;
    let losses = |name: &str, device: Device| -> Result<Vec<f64>> {
        let config = small.config(name, &["train.steps=10", "train.eval_every=0"])?;
        let (trainer, _) = small::sit(&config, &on(device))?;
        let records: Vec<StepRecord> = read(&trainer.run_dir().join(METRICS))?;
        Ok(records.into_iter().map(|record| f64::from(record.loss)).collect())
    };
    let (got, want) = (losses("device", device)?, losses("cpu", Device::Cpu)?);
    ensure(got.len() == 10 && want.len() == 10, || format!("{} and {} losses", got.len(), want.len()))?;
    let errors = got.iter().zip(&want).map(|(got, want)| (got / want - 1.).abs());
    let worst = errors.fold(0f64, |worst, error| if error <= worst { worst } else { error });
    ensure(worst <= MAX_REL, || format!("off by {worst:.1e}: {got:?}, on the CPU {want:?}"))?;
    Ok(format!("10 steps, {worst:.0e}"))
}
