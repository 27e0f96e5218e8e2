//! How long something takes.

use std::time::Instant;

use flowhn_torch::{Event, Result, Stream};
use tch::{Device, Kind, Tensor};

/// Written before each call, so that nothing the call reads is in the L2 cache: several times what any GPU has of it.
const FLUSH_BYTES: i64 = 256 << 20;
/// How often it is written. It keeps the GPU busy for most of a millisecond, in which the host gets ahead of it: the GPU
/// then never waits for a launch between two events.
const N_FLUSHES: usize = 8;
/// Calls before the first that counts: they compile kernels and fill the allocator's cache.
const WARM_UP: usize = 3;

/// Times calls on one device.
pub struct Timer {
    device: Device,
    n: usize,
    flush: Tensor,
}

/// What was measured, in microseconds.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    /// Time on the device, from cold caches; of each call.
    pub device_us: Vec<f64>,
    /// Time on the host of a call among many in a row, warm.
    pub wall_us: Vec<f64>,
}

impl Timer {
    /// A timer that calls `n` times.
    pub fn new(device: Device, n: usize) -> Result<Self> {
        let n_bytes = if device.is_cuda() { FLUSH_BYTES } else { 1 };
        Ok(Self { device, n, flush: Tensor::f_zeros([n_bytes], (Kind::Uint8, device))? })
    }

    /// Times `call`. On the CPU, which has no events, the host's clock stands for the device's.
    pub fn time(&self, call: &dyn Fn() -> Result<()>) -> Result<Samples> {
        self.in_turns([call]).map(|[samples]| samples)
    }

    /// As [`Timer::time`], of several in turns: they meet the same temperature and, at the power limit, the same clock.
    pub fn in_turns<const N: usize>(&self, calls: [&dyn Fn() -> Result<()>; N]) -> Result<[Samples; N]> {
        for _ in 0..WARM_UP {
            calls.iter().try_for_each(|call| call())?;
        }
        let mut samples = [const { Samples { device_us: Vec::new(), wall_us: Vec::new() } }; N];
        for _ in 0..self.n {
            for (call, samples) in calls.iter().zip(&mut samples) {
                samples.device_us.push(match self.device {
                    Device::Cuda(device_idx) => self.one_on_cuda(device_idx, call)?,
                    _ => micros(Instant::now(), call)?,
                });
            }
        }
        for (call, samples) in calls.iter().zip(&mut samples) {
            self.synchronize()?;
            let started = Instant::now();
            for _ in 0..self.n {
                call()?;
            }
            self.synchronize()?;
            samples.wall_us.push(started.elapsed().as_secs_f64() * 1e6 / self.n as f64);
        }
        Ok(samples)
    }

    fn one_on_cuda(&self, device_idx: usize, call: &dyn Fn() -> Result<()>) -> Result<f64> {
        let stream = Stream::current(device_idx)?;
        let (mut start, mut end) = (Event::new(true)?, Event::new(true)?);
        for _ in 0..N_FLUSHES {
            let _ = self.flush.shallow_clone().f_zero_()?;
        }
        start.record(stream)?;
        call()?;
        end.record(stream)?;
        end.synchronize()?;
        Ok(1e3 * start.elapsed_ms(&end)?)
    }

    fn synchronize(&self) -> Result<()> {
        match self.device {
            Device::Cuda(device_idx) => Stream::current(device_idx)?.synchronize(),
            _ => Ok(()),
        }
    }
}

fn micros(started: Instant, call: &dyn Fn() -> Result<()>) -> Result<f64> {
    call()?;
    Ok(started.elapsed().as_secs_f64() * 1e6)
}

impl Samples {
    /// Adds those of another round.
    pub fn extend(&mut self, other: Self) {
        self.device_us.extend(other.device_us);
        self.wall_us.extend(other.wall_us);
    }

    /// Takes a fixed part off every time on the device.
    pub fn less(mut self, us: f64) -> Self {
        self.device_us.iter_mut().for_each(|sample| *sample = (*sample - us).max(0.));
        self
    }

    /// Median, least and most on the device.
    pub fn spread(&self) -> (f64, f64, f64) {
        let mut sorted = self.device_us.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |idx: usize| sorted.get(idx).copied().unwrap_or(f64::NAN);
        (at(sorted.len() / 2), at(0), at(sorted.len().saturating_sub(1)))
    }

    /// Mean on the host.
    pub fn wall(&self) -> f64 {
        self.wall_us.iter().sum::<f64>() / self.wall_us.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_is_median_least_and_most() {
        let mut samples = Samples { device_us: vec![5., 1.], wall_us: vec![2.] };
        samples.extend(Samples { device_us: vec![9., 3., 4.], wall_us: vec![4.] });
        assert_eq!(samples.spread(), (4., 1., 9.));
        assert_eq!(samples.wall(), 3.);
        assert_eq!(samples.less(2.).spread(), (2., 0., 7.));
    }

    #[test]
    fn calls_are_counted_and_their_errors_come_back() {
        let timer = Timer::new(Device::Cpu, 5).unwrap();
        let n_calls = std::cell::Cell::new(0);
        let count = || {
            n_calls.set(n_calls.get() + 1);
            Ok(())
        };
        let samples = timer.time(&count).unwrap();
        assert_eq!((samples.device_us.len(), n_calls.get()), (5, WARM_UP + 10));
        let order = std::cell::RefCell::new(Vec::new());
        let noting = |idx: u8| {
            let order = &order;
            move || {
                order.borrow_mut().push(idx);
                Ok(())
            }
        };
        let both = timer.in_turns([&noting(0), &noting(1)]).unwrap();
        assert!(both.iter().all(|samples| (samples.device_us.len(), samples.wall_us.len()) == (5, 1)));
        // The time on the host is that of many calls in a row.
        let want = [[0, 1].repeat(WARM_UP + 5), vec![0; 5], vec![1; 5]].concat();
        assert_eq!(*order.borrow(), want);
        let failing = || Err(flowhn_torch::Error::invalid("bench", "no".to_owned()));
        assert!(timer.time(&failing).is_err());
    }
}
