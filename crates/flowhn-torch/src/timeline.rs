//! Where the time of a step goes: marks between its parts, on the device's own clock, forward and backward.
//!
//! A model says once what its parts are ([`pass`], [`mark`]); that costs nothing until somebody holds a [`Timeline`]. On CUDA a mark is
//! a launch of one thread, which a CUDA graph captures like any other, so that a replayed step can be looked at as well.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tch::{Device, Kind, Tensor};

use crate::kernel::{Arg, Kernel, KernelSource, KernelSpec};
use crate::{BackwardCtx, Error, ForwardCtx, Function, Result, apply};

/// The marks on CUDA.
static TIMELINE: KernelSource =
    KernelSource { name: "timeline.cu", text: include_str!("../kernels/timeline.cu"), headers: &[] };

pub(crate) const KERNELS: KernelSpec = KernelSpec { source: &TIMELINE, variants: &[&[]] };

/// Marks of a step, and the two entries behind them that `timeline.cu` names.
const CAPACITY: i64 = 8192;

static ACTIVE: Mutex<Option<Arc<Recorder>>> = Mutex::new(None);

/// While it lives, marks are recorded. There is one at a time.
#[derive(Debug)]
pub struct Timeline(Arc<Recorder>);

/// What one part of a step took.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Its name.
    pub name: &'static str,
    /// Milliseconds between the marks that begin it and those that end it.
    pub ms: f64,
}

#[derive(Debug)]
struct Recorder {
    device: Device,
    marks: Mutex<Marks>,
}

#[derive(Debug, Default)]
struct Marks {
    /// What begins at each mark.
    names: Vec<&'static str>,
    /// The device's clock at each mark, i64 `[CAPACITY]` nanoseconds.
    on_device: Option<Tensor>,
    on_host: Vec<Instant>,
    /// When the walk before the last ended, and what lay between.
    idle_ms: f64,
}

impl Timeline {
    /// Starts recording on a device.
    ///
    /// # Errors
    /// [`Error::Invalid`] if somebody else records; [`Error::Torch`] if there is no memory.
    pub fn start(device: Device) -> Result<Self> {
        let on_device = device.is_cuda().then(|| Tensor::f_zeros([CAPACITY], (Kind::Int64, device))).transpose()?;
        let marks = Mutex::new(Marks { on_device, ..Marks::default() });
        let recorder = Arc::new(Recorder { device, marks });
        let mut active = locked(&ACTIVE);
        if active.is_some() {
            return Err(Error::invalid("timeline", "another one records already; there is one at a time"));
        }
        *active = Some(recorder.clone());
        Ok(Self(recorder))
    }

    /// The parts of the last walk from [`begin`] to [`end`], each name once, in the order in which they first began, and the milliseconds
    /// between the walk before and it. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Invalid`] if no walk was ended.
    pub fn parts(&self) -> Result<(Vec<Part>, f64)> {
        let marks = locked(&self.0.marks);
        if marks.names.len() < 2 || marks.names.last() != Some(&END) {
            return Err(Error::invalid("timeline", "no step was walked from its begin to its end"));
        }
        let (at_ms, idle_ms) = match &marks.on_device {
            Some(times) => {
                let times: Vec<i64> = Vec::try_from(times.f_to_device(Device::Cpu)?)?;
                let at_ms = times[..marks.names.len()].iter().map(|&time| (time - times[0]) as f64 / 1e6).collect();
                (at_ms, times[CAPACITY as usize - 1] as f64 / 1e6)
            }
            None => {
                let since_begin = |at: &Instant| (*at - marks.on_host[0]).as_secs_f64() * 1e3;
                (marks.on_host.iter().map(since_begin).collect::<Vec<f64>>(), marks.idle_ms)
            }
        };
        let mut parts: Vec<Part> = Vec::new();
        for (name, pair) in marks.names.iter().zip(at_ms.windows(2)) {
            let ms = pair[1] - pair[0];
            match parts.iter_mut().find(|part| part.name == *name) {
                Some(part) => part.ms += ms,
                None => parts.push(Part { name, ms }),
            }
        }
        Ok((parts, idle_ms))
    }
}

impl Drop for Timeline {
    fn drop(&mut self) {
        *locked(&ACTIVE) = None;
    }
}

const END: &str = "end";

/// Begins a walk through a step with the part `name`; forgets the marks of the last one.
///
/// # Errors
/// [`Error::Kernel`] if the mark cannot be launched.
pub fn begin(name: &'static str) -> Result<()> {
    let Some(recorder) = recorder() else { return Ok(()) };
    let mut marks = locked(&recorder.marks);
    marks.names = vec![name];
    match &marks.on_device {
        Some(times) => launch("timeline_begin", times, CAPACITY),
        None => {
            let now = Instant::now();
            marks.idle_ms = marks.on_host.last().map_or(0., |last| (now - *last).as_secs_f64() * 1e3);
            marks.on_host = vec![now];
            Ok(())
        }
    }
}

/// From here on, in the order of the stream, the time belongs to part `name`.
///
/// # Errors
/// [`Error::Kernel`] if the mark cannot be launched, [`Error::Invalid`] if there are too many.
pub fn mark(name: &'static str) -> Result<()> {
    match recorder() {
        Some(recorder) => recorder.mark(name),
        None => Ok(()),
    }
}

/// Ends the walk.
///
/// # Errors
/// As [`mark`].
pub fn end() -> Result<()> {
    let Some(recorder) = recorder() else { return Ok(()) };
    recorder.mark(END)?;
    let marks = locked(&recorder.marks);
    marks.on_device.as_ref().map_or(Ok(()), |times| launch("timeline_mark", times, CAPACITY - 2))
}

/// `x`, and a mark where it is made: what follows belongs to part `forward`, and, when its gradient comes back through here, what follows
/// then belongs to part `backward`.
///
/// # Errors
/// As [`mark`].
pub fn pass(x: &Tensor, forward: &'static str, backward: &'static str) -> Result<Tensor> {
    match recorder() {
        Some(recorder) if recorder.device == x.device() => Ok(apply(Pass { forward, backward }, &[x])?.swap_remove(0)),
        _ => Ok(x.shallow_clone()),
    }
}

struct Pass {
    forward: &'static str,
    backward: &'static str,
}

impl Function for Pass {
    const NAME: &'static str = "timeline_pass";

    fn forward(&mut self, _ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        mark(self.forward)?;
        Ok(vec![inputs[0].shallow_clone()])
    }

    fn backward(&self, _ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        mark(self.backward)?;
        Ok(vec![Some(grads[0].shallow_clone())])
    }
}

impl Recorder {
    fn mark(&self, name: &'static str) -> Result<()> {
        let mut marks = locked(&self.marks);
        let idx = marks.names.len() as i64;
        if idx >= CAPACITY - 2 {
            return Err(Error::invalid("timeline", format!("a step has at most {} marks", CAPACITY - 2)));
        }
        marks.names.push(name);
        match &marks.on_device {
            Some(times) => launch("timeline_mark", times, idx),
            None => {
                marks.on_host.push(Instant::now());
                Ok(())
            }
        }
    }
}

fn launch(entry: &'static str, times: &Tensor, idx: i64) -> Result<()> {
    let args = [Arg::Tensor(times), Arg::I32(idx as i32)];
    Kernel { source: &TIMELINE, entry, defines: &[] }.launch([1, 1, 1], 1, 0, &args)
}

fn recorder() -> Option<Arc<Recorder>> {
    locked(&ACTIVE).clone()
}

/// The value, also after a panic elsewhere: names and times are whole at any moment.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_is_cut_into_its_parts_forward_and_backward() {
        let wait = || std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(mark("nobody listens").is_ok());
        let timeline = Timeline::start(Device::Cpu).unwrap();
        assert!(timeline.parts().is_err(), "nothing was walked");
        assert!(Timeline::start(Device::Cpu).is_err(), "one at a time");
        for _ in 0..2 {
            begin("a").unwrap();
            let x = Tensor::from_slice(&[1f64]).set_requires_grad(true);
            let y = pass(&x, "b", "a").unwrap();
            wait();
            let z = pass(&(y * 2.), "c", "b").unwrap();
            z.backward();
            wait();
            end().unwrap();
            assert_eq!(x.grad().double_value(&[0]), 2.);
            wait();
        }
        let (parts, idle_ms) = timeline.parts().unwrap();
        assert_eq!(parts.iter().map(|part| part.name).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert!(parts[0].ms >= 20. && parts[1].ms >= 20. && parts[2].ms < 20. && idle_ms >= 20., "{parts:?} {idle_ms}");
        drop(timeline);
        assert!(Timeline::start(Device::Cpu).is_ok(), "free again");
    }
}
