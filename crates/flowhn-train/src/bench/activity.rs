//! Which kernels a step launches, how long each runs, and in which share of the time any of them does.
//!
//! Recording makes the time between two kernels longer. How much is measured on a chain of the shortest kernels, and taken off each gap.

use flowhn_torch::activity::{Activity, Occupation, Record};
use flowhn_torch::{CaptureMode, Event, Graph, Stream, catch};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::step::{CapturedStep, Stepper};

/// Steps in front of those that count: two that run operator by operator, one that is captured, one that is replayed.
const BEFORE: usize = 4;
/// Steps that count.
const COUNTED: usize = 3;
/// Kernels of the chain that tells what recording takes.
const CHAIN: usize = 512;
/// How often it runs; the shortest time counts.
const CHAIN_RUNS: usize = 10;

/// What a GPU does in a step, as CUPTI records it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepActivity {
    /// Share of the time from the begin of one step to the end of another in which a kernel or a copy runs, without what recording takes.
    pub busy_frac: f64,
    /// Milliseconds of a step while CUPTI records.
    pub recorded_step_ms: f64,
    /// What recording takes of them: for each time that nothing runs, what it adds to one in a chain of short kernels.
    pub recording_ms: f64,
    /// The kernels and copies, those that take the most time first.
    pub kernels: Vec<KernelTime>,
}

/// All launches of one kernel in a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelTime {
    /// Its symbol, or `memcpy` or `memset`.
    pub name: String,
    /// Launches; those of a step that is not like the others make it a fraction.
    pub n_launches: f64,
    /// Milliseconds of all of them; kernels beside each other count twice.
    pub ms: f64,
}

/// What the device does in steps like those that were measured, or why that cannot be recorded. A captured step is captured anew.
pub(super) fn of_steps(stepper: &mut Stepper, device_idx: usize) -> Result<std::result::Result<StepActivity, String>> {
    let stream = Stream::current(device_idx)?;
    let recorder = chain_ms(stream, device_idx).and_then(|unrecorded_ms| {
        let recorder = Activity::start()?;
        let gap_ms = (chain_ms(stream, device_idx)? - unrecorded_ms).max(0.) / CHAIN as f64;
        Ok((recorder, gap_ms))
    });
    let (recorder, gap_ms) = match recorder {
        Ok(recorder) => recorder,
        Err(error) => return Ok(Err(error.to_string())),
    };
    if stepper.captured.take().is_some() {
        stepper.captured = Some(CapturedStep::new());
    }
    let mut steps = |n_steps| -> Result<()> {
        (0..n_steps).try_for_each(|_| stepper.train_step())?;
        Ok(stream.synchronize()?)
    };
    steps(BEFORE)?;
    let before = recorder.take();
    steps(COUNTED)?;
    // Before the losses are read, which is no part of a step.
    let records = before.and_then(|_| recorder.take());
    stepper.read()?;
    Ok(records.map_err(|error| error.to_string()).and_then(|records| {
        StepActivity::of(&records, COUNTED as f64, gap_ms).ok_or_else(|| "CUPTI recorded no kernels".to_owned())
    }))
}

/// What a graph of short kernels, each of which waits for the one in front of it, takes at least.
fn chain_ms(stream: Stream, device_idx: usize) -> flowhn_torch::Result<f64> {
    let mut graph = Graph::new()?;
    let mut x = Tensor::f_zeros([1], (Kind::Float, Device::Cuda(device_idx)))?;
    let chain = || (0..CHAIN).try_for_each(|_| catch(|| Ok(x.f_add_scalar_(1.)?)).map(drop));
    graph.capture(None, CaptureMode::ThreadLocal, chain)?;
    let run = || -> flowhn_torch::Result<f64> {
        let (mut begin, mut end) = (Event::new(true)?, Event::new(true)?);
        begin.record(stream)?;
        graph.replay()?;
        end.record(stream)?;
        stream.synchronize()?;
        begin.elapsed_ms(&end)
    };
    (0..CHAIN_RUNS).try_fold(f64::INFINITY, |least, _| Ok(run()?.min(least)))
}

impl StepActivity {
    /// Of what so many steps launched, if recording makes a gap so much longer; `None` if they launched nothing.
    fn of(records: &[Record], n_steps: f64, gap_ms: f64) -> Option<Self> {
        let Occupation { all_ns, busy_ns, n_gaps } = Occupation::of(records);
        if all_ns == 0 {
            return None;
        }
        let [all_ms, busy_ms] = [all_ns, busy_ns].map(|ns| ns as f64 / 1e6 / n_steps);
        let recording_ms = (n_gaps as f64 / n_steps * gap_ms).min(all_ms - busy_ms);
        let mut kernels: Vec<KernelTime> = Vec::new();
        for Record { name, start_ns, end_ns } in records {
            let (n_launches, ms) = (n_steps.recip(), (end_ns - start_ns) as f64 / 1e6 / n_steps);
            match kernels.iter_mut().find(|kernel| kernel.name == *name) {
                Some(kernel) => (kernel.n_launches, kernel.ms) = (kernel.n_launches + n_launches, kernel.ms + ms),
                None => kernels.push(KernelTime { name: name.clone(), n_launches, ms }),
            }
        }
        kernels.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        let busy_frac = busy_ms / (all_ms - recording_ms);
        Some(Self { busy_frac, recorded_step_ms: all_ms, recording_ms, kernels })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_of_a_kernel_are_added_up_and_the_longest_comes_first() {
        let record = |name: &str, start_ns, end_ns| Record { name: name.to_owned(), start_ns, end_ns };
        let step = |at: u64| {
            [
                record("a", at, at + 1_000_000),
                record("b", at + 1_000_000, at + 6_000_000),
                record("a", at + 7_000_000, at + 8_000_000),
            ]
        };
        let records: Vec<Record> = [step(0), step(8_000_000)].concat();
        let of = |gap_ms| StepActivity::of(&records, 2., gap_ms).unwrap();
        let activity = of(0.);
        assert_eq!((activity.busy_frac, activity.recorded_step_ms, activity.recording_ms), (7. / 8., 8., 0.));
        assert_eq!((of(0.125).busy_frac, of(0.125).recording_ms), (7. / 7.875, 0.125));
        assert_eq!(of(9.).busy_frac, 1., "recording takes no more than the gaps");
        let named: Vec<_> = activity.kernels.iter().map(|k| (k.name.as_str(), k.n_launches, k.ms)).collect();
        assert_eq!(named, [("b", 1., 5.), ("a", 2., 2.)]);
        assert_eq!(StepActivity::of(&[], 2., 0.), None);
    }
}
