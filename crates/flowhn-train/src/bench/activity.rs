//! Which kernels a step launches, how long each runs, and in which share of the time any of them does.

use flowhn_torch::Stream;
use flowhn_torch::activity::{self, Activity, Record};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::step::{CapturedStep, Stepper};

/// Steps in front of those that count: two that run operator by operator, one that is captured, one that is replayed.
const BEFORE: usize = 4;
/// Steps that count.
const COUNTED: usize = 3;

/// What a GPU does in a step, as CUPTI records it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepActivity {
    /// Share of the time from the begin of one step to the end of another in which a kernel or a copy runs.
    pub busy_frac: f64,
    /// Milliseconds of a step while CUPTI records, which takes time of its own.
    pub step_ms: f64,
    /// The kernels and copies, those that take the most time first.
    pub kernels: Vec<KernelTime>,
}

/// All launches of one kernel in a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelTime {
    /// Its symbol, or `memcpy` or `memset`.
    pub name: String,
    /// Launches.
    pub launches: f64,
    /// Milliseconds of all of them; kernels beside each other count twice.
    pub ms: f64,
}

/// What the device does in steps like those that were measured, or why that cannot be recorded. A captured step is captured anew.
pub(super) fn of_steps(stepper: &mut Stepper, device_idx: usize) -> Result<std::result::Result<StepActivity, String>> {
    let recorder = match Activity::start() {
        Ok(recorder) => recorder,
        Err(error) => return Ok(Err(error.to_string())),
    };
    if stepper.captured.take().is_some() {
        stepper.captured = Some(CapturedStep::new());
    }
    let stream = Stream::current(device_idx)?;
    let mut recorded = |n_steps| -> Result<Vec<Record>> {
        (0..n_steps).try_for_each(|_| stepper.train_step())?;
        stream.synchronize()?;
        let records = recorder.take()?;
        // Behind the steps, so that it is not among what they do.
        stepper.read()?;
        Ok(records)
    };
    recorded(BEFORE)?;
    // What the reading launched.
    recorder.take()?;
    let records = recorded(COUNTED)?;
    Ok(StepActivity::of(&records, COUNTED as f64).ok_or_else(|| "CUPTI recorded no kernels".to_owned()))
}

impl StepActivity {
    /// Of what so many steps launched; `None` if that is nothing.
    fn of(records: &[Record], n_steps: f64) -> Option<Self> {
        let (all_ns, busy_ns) = activity::busy_ns(records);
        if all_ns == 0 {
            return None;
        }
        let mut kernels: Vec<KernelTime> = Vec::new();
        for Record { name, start_ns, end_ns } in records {
            let (launches, ms) = (n_steps.recip(), (end_ns - start_ns) as f64 / 1e6 / n_steps);
            match kernels.iter_mut().find(|kernel| kernel.name == *name) {
                Some(kernel) => (kernel.launches, kernel.ms) = (kernel.launches + launches, kernel.ms + ms),
                None => kernels.push(KernelTime { name: name.clone(), launches, ms }),
            }
        }
        kernels.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        Some(Self { busy_frac: busy_ns as f64 / all_ns as f64, step_ms: all_ns as f64 / 1e6 / n_steps, kernels })
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
        let activity = StepActivity::of(&records, 2.).unwrap();
        assert_eq!((activity.busy_frac, activity.step_ms), (14. / 16., 8.));
        let named: Vec<_> = activity.kernels.iter().map(|k| (k.name.as_str(), k.launches, k.ms)).collect();
        assert_eq!(named, [("b", 1., 5.), ("a", 2., 2.)]);
        assert_eq!(StepActivity::of(&[], 2.), None);
    }
}
