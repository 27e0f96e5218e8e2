//! What CUPTI records.

use tch::{Device, Kind, Tensor};

use super::{ensure, error_of, of_cuda};
use crate::activity::{Activity, Occupation, Record};
use crate::testing::Case;
use crate::{CaptureMode, Error, Graph, Priority, Result, Stream};

pub(super) fn cases() -> Vec<Case> {
    vec![of_cuda("activity: kernels are recorded, those of a graph one by one", kernels)]
}

fn kernels(device_idx: usize) -> Result<String> {
    const N: usize = 20;
    let side = Stream::from_pool(device_idx, Priority::Normal)?;
    let _guard = side.enter()?;
    let mut x = Tensor::f_ones([1 << 20], (Kind::Float, Device::Cuda(device_idx)))?;
    let mut add = || (0..N).try_for_each(|_| x.f_add_scalar_(1.).map(drop).map_err(Error::from));
    let mut found = String::new();
    // The second finds nothing of the first.
    for _ in 0..2 {
        let recorder = Activity::start()?;
        let message = error_of(Activity::start())?;
        ensure(message.contains("another one records"), || message)?;
        let mut graph = Graph::new()?;
        graph.capture(None, CaptureMode::ThreadLocal, &mut add)?;
        // What made the tensor and the graph is not among what is counted.
        side.synchronize()?;
        recorder.take()?;
        for (what, by_graph) in [("launched", false), ("replayed", true)] {
            if by_graph {
                graph.replay()?
            } else {
                add()?
            }
            side.synchronize()?;
            let records = recorder.take()?;
            // A replay may also renew the state of a random generator.
            let n_kernels = records.iter().filter(|record| is_addition(record)).count();
            ensure(n_kernels == N, || format!("{what}: {n_kernels} kernels of {N}"))?;
            ensure(records.iter().all(|record| !record.name.is_empty() && record.start_ns <= record.end_ns), || {
                format!("{what}: {records:?}")
            })?;
            let Occupation { all_ns, busy_ns, n_gaps } = Occupation::of(&records);
            ensure(busy_ns <= all_ns && all_ns < 1_000_000_000, || format!("{what}: {busy_ns} of {all_ns} ns"))?;
            found = format!("{n_kernels} kernels, {busy_ns} of {all_ns} ns, {n_gaps} gaps");
        }
    }
    // What is launched now is for nobody.
    add()?;
    side.synchronize()?;
    let left = Activity::start()?.take()?;
    ensure(!left.iter().any(is_addition), || format!("there are records of before: {left:?}"))?;
    Ok(found)
}

/// Whether it is libtorch's kernel for the addition of a number.
fn is_addition(record: &Record) -> bool {
    record.name.contains("_add")
}
