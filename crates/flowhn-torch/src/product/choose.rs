//! Which of several ways to do a product is taken.

use std::sync::Arc;

use tch::{Kind, Tensor};

use super::plan::{Plan, Sizes};
use super::{Known, Sum, by_libtorch};
use crate::{Event, Result, Stream};

/// Times that every way is taken while they are compared, in turns, after once to warm up.
const ROUNDS: usize = 5;
/// Products in a row that are timed as one.
const REPEATS: usize = 2;
/// Less than this part of libtorch's time is worth another way.
const GAIN: f64 = 0.99;

/// The most memory that is taken beside the result while others are compared with libtorch's: as many rows as fit.
const MAX_SCRATCH_BYTES: i64 = 64 << 20;

/// Compares what cuBLASLt proposes for `a b` with libtorch's product, whose result `out` is and stays; `None` where that tells nothing.
pub(super) fn choose(device_idx: usize, sizes: &Sizes, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<Option<Known>> {
    // A result that is zero for the most part has the same bits in any order of additions.
    let n_nonzero = out.f_norm_scalaropt_dtype(0., Kind::Float)?.f_double_value(&[])?;
    if 2. * n_nonzero < out.numel() as f64 {
        return Ok(None);
    }
    let mut own = || by_libtorch(a, b, out, Sum::New);
    let mut equal = Plan::proposals(device_idx, sizes)?;
    let n_rows = out.size()[0];
    let n_at_once = rows_of(MAX_SCRATCH_BYTES, out);
    for start in (0..n_rows).step_by(n_at_once) {
        if start > 0 {
            own()?;
        }
        let mut rows = out.f_narrow(0, start, (n_at_once as i64).min(n_rows - start))?;
        let mut want = rows.f_empty_like()?;
        want.f_copy_(&rows)?;
        let mut still_equal = Vec::new();
        for plan in equal {
            let _ = rows.f_fill_(f64::NAN)?;
            // What cuBLASLt proposes it may still refuse.
            if plan.run(device_idx, a, b, out, Sum::New).is_ok() && rows.f_equal(&want)? {
                still_equal.push(plan);
            }
        }
        equal = still_equal;
    }
    let libtorch_ms = &mut Times::default();
    let mut times: Vec<Times> = equal.iter().map(|_| Times::default()).collect();
    for _ in 0..=ROUNDS {
        libtorch_ms.add(device_idx, &mut own)?;
        for (plan, times) in equal.iter().zip(&mut times) {
            times.add(device_idx, &mut || plan.run(device_idx, a, b, out, Sum::New))?;
        }
    }
    own()?;
    let limit = GAIN * libtorch_ms.median()?;
    let medians = times.iter().map(Times::median).collect::<Result<Vec<_>>>()?;
    let best = medians.into_iter().enumerate().min_by(|(_, a), (_, b)| a.total_cmp(b)).filter(|(_, ms)| *ms < limit);
    let Some((idx, _)) = best else { return Ok(Some(Known::Libtorch)) };
    let plan = equal.swap_remove(idx);
    let adds = adds_alike(device_idx, &plan, a, b, out)?;
    own()?;
    Ok(Some(Known::Plan { plan: Arc::new(plan), adds }))
}

/// Whether what a way adds to is the sum that libtorch's product has, bit for bit. Leaves `out` with sums.
fn adds_alike(device_idx: usize, plan: &Plan, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<bool> {
    let n_rows = out.size()[0];
    // Two tensors as large as the part of the result that is compared.
    for start in (0..n_rows).step_by(rows_of(MAX_SCRATCH_BYTES / 2, out)) {
        by_libtorch(a, b, out, Sum::New)?;
        let mut rows = out.f_narrow(0, start, (rows_of(MAX_SCRATCH_BYTES / 2, out) as i64).min(n_rows - start))?;
        // As large as what is added, and not the same: twice a number would hide in which order it came about.
        let before = rows.f_roll([1], [1])?;
        rows.f_copy_(&before)?;
        by_libtorch(a, b, out, Sum::Old)?;
        let mut want = rows.f_empty_like()?;
        want.f_copy_(&rows)?;
        rows.f_copy_(&before)?;
        if plan.run(device_idx, a, b, out, Sum::Old).is_err() || !rows.f_equal(&want)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Rows of `out` that fit into so many bytes, at least one.
fn rows_of(n_bytes: i64, out: &Tensor) -> usize {
    let row_bytes = out.size()[1] * out.kind().elt_size_in_bytes() as i64;
    (n_bytes / row_bytes.max(1)).clamp(1, out.size()[0]) as usize
}

/// Stretches of the device's time, asked for at the end so that the device never waits.
#[derive(Default)]
struct Times(Vec<[Event; 2]>);

impl Times {
    fn add(&mut self, device_idx: usize, run: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let stream = Stream::current(device_idx)?;
        let mut ends = [Event::new(true)?, Event::new(true)?];
        ends[0].record(stream)?;
        for _ in 0..REPEATS {
            run()?;
        }
        ends[1].record(stream)?;
        self.0.push(ends);
        Ok(())
    }

    /// In milliseconds, without the first.
    fn median(&self) -> Result<f64> {
        let mut ms = Vec::new();
        for [start, end] in self.0.iter().skip(1) {
            end.synchronize()?;
            ms.push(start.elapsed_ms(end)?);
        }
        ms.sort_by(f64::total_cmp);
        Ok(ms[ms.len() / 2])
    }
}
