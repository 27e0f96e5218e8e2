//! What a GPU draws while it works, as its driver's library NVML tells it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use flowhn_torch::DeviceProperties;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::Clock;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};
use serde::{Deserialize, Serialize};

use crate::Result;

/// The file that every driver brings; without its number it comes with headers only.
const LIBRARY: &str = "libnvidia-ml.so.1";
/// Between two readings. The driver renews its counter of energy some ten to fifty times a second.
const INTERVAL: Duration = Duration::from_millis(5);

/// What a GPU draws while it works.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Power {
    /// Mean power in watts, by the counter of energy.
    pub watts: f64,
    /// The limit at which the driver lowers the clock, in watts.
    pub limit_watts: f64,
    /// Share of the time in which the driver said that power (or heat) holds the clock back.
    pub held_back_frac: f64,
    /// Mean clock of the multiprocessors, MHz.
    pub clock_mhz: f64,
    /// The most that this clock can be, MHz.
    pub max_clock_mhz: f64,
}

/// One reading.
#[derive(Clone, Copy, Debug)]
struct Sample {
    seconds: f64,
    /// Energy since the driver was loaded.
    millijoules: u64,
    clock_mhz: u32,
    is_held_back: bool,
}

/// Runs `work`, which ends with the device idle, and reads the device beside it. `Err` inside tells why nothing could be read; where
/// there is no NVML, `work` is left out.
///
/// # Errors
/// Those of `work`.
pub(super) fn while_running(
    device_idx: usize,
    work: impl FnOnce() -> Result<()>,
) -> Result<std::result::Result<Power, String>> {
    let nvml = match open(device_idx) {
        Ok(nvml) => nvml,
        Err(message) => return Ok(Err(message)),
    };
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_until(&nvml, &is_done));
        let worked = {
            let _done = Done(&is_done);
            work()
        };
        let read = reader.join().unwrap_or_else(|_| Err("its reader panicked".to_owned()));
        worked.map(|()| read)
    })
}

/// Says that the work is done when it goes, after a panic as well: the scope waits for the reader.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// NVML, and how it calls the device.
struct Source {
    nvml: Nvml,
    pci_bus_id: &'static str,
}

fn open(device_idx: usize) -> std::result::Result<Source, String> {
    let properties = DeviceProperties::of(device_idx).map_err(|error| error.to_string())?;
    let nvml = Nvml::builder().lib_path(LIBRARY.as_ref()).init().map_err(|error| format!("{LIBRARY}: {error}"))?;
    Ok(Source { nvml, pci_bus_id: &properties.pci_bus_id })
}

fn read_until(source: &Source, is_done: &AtomicBool) -> std::result::Result<Power, String> {
    let read = || -> std::result::Result<_, NvmlError> {
        let device = source.nvml.device_by_pci_bus_id(source.pci_bus_id)?;
        let limit_watts = f64::from(device.enforced_power_limit()?) / 1e3;
        let max_clock_mhz = device.max_clock_info(Clock::SM)?.into();
        let began = Instant::now();
        let mut samples = Vec::new();
        while !is_done.load(Ordering::Acquire) {
            samples.push(sample(&device, began)?);
            thread::sleep(INTERVAL);
        }
        Ok((samples, limit_watts, max_clock_mhz))
    };
    let (samples, limit_watts, max_clock_mhz) = read().map_err(|error| format!("NVML: {error}"))?;
    Power::of(&samples, limit_watts, max_clock_mhz)
        .ok_or_else(|| "the driver's counter of energy was renewed less than twice".to_owned())
}

fn sample(device: &Device, began: Instant) -> std::result::Result<Sample, NvmlError> {
    let slow = ThrottleReasons::SW_POWER_CAP
        | ThrottleReasons::HW_SLOWDOWN
        | ThrottleReasons::SW_THERMAL_SLOWDOWN
        | ThrottleReasons::HW_THERMAL_SLOWDOWN
        | ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN;
    let millijoules = device.total_energy_consumption()?;
    Ok(Sample {
        seconds: began.elapsed().as_secs_f64(),
        millijoules,
        clock_mhz: device.clock_info(Clock::SM)?,
        is_held_back: device.current_throttle_reasons()?.intersects(slow),
    })
}

impl Power {
    /// Of readings in order; `None` where the counter was not renewed twice.
    fn of(samples: &[Sample], limit_watts: f64, max_clock_mhz: f64) -> Option<Self> {
        // The counter goes up by steps. From one of its renewals to another the energy and the time belong together.
        let renewed = |pair: &&[Sample]| pair[0].millijoules != pair[1].millijoules;
        let first = samples.windows(2).find(renewed)?[1];
        let last = samples.windows(2).rev().find(renewed)?[1];
        if last.millijoules == first.millijoules {
            return None;
        }
        let mean = |value: fn(&Sample) -> f64| samples.iter().map(value).sum::<f64>() / samples.len() as f64;
        Some(Self {
            watts: (last.millijoules - first.millijoules) as f64 / 1e3 / (last.seconds - first.seconds),
            limit_watts,
            held_back_frac: mean(|sample| f64::from(u8::from(sample.is_held_back))),
            clock_mhz: mean(|sample| sample.clock_mhz.into()),
            max_clock_mhz,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A counter that shows what 400 W took up to its last renewal, every 20 ms, read every 5 ms.
    fn samples(n: u64) -> Vec<Sample> {
        let sample = |n: u64| Sample {
            seconds: n as f64 * 0.005,
            millijoules: 7_000_000 + n / 4 * 8_000,
            clock_mhz: 1500 + 100 * (n % 2) as u32,
            is_held_back: !n.is_multiple_of(4),
        };
        (0..n).map(sample).collect()
    }

    #[test]
    fn power_is_energy_over_time_between_renewals_of_the_counter() {
        // However the ends of the time fall between two renewals.
        for n in [12, 13, 14, 15, 16, 101] {
            let power = Power::of(&samples(n), 700., 1980.).unwrap();
            assert!((power.watts - 400.).abs() < 1e-9, "{n} readings: {power:?}");
        }
        let power = Power::of(&samples(100), 700., 1980.).unwrap();
        assert_eq!((power.held_back_frac, power.clock_mhz), (0.75, 1550.));
        assert_eq!((power.limit_watts, power.max_clock_mhz), (700., 1980.));
    }

    #[test]
    fn one_renewal_tells_no_power() {
        for n in [0, 1, 4, 5, 8] {
            assert_eq!(Power::of(&samples(n), 700., 1980.), None, "{n} readings");
        }
        assert!(Power::of(&samples(9), 700., 1980.).is_some());
    }

    #[test]
    fn what_cannot_be_read_says_why_and_the_work_is_not_done_for_nothing() {
        // A device that no machine has.
        let mut n_calls = 0;
        let read = while_running(4096, || {
            n_calls += 1;
            Ok(())
        });
        assert!(!read.unwrap().unwrap_err().is_empty());
        assert_eq!(n_calls, 0);
    }
}
