//! The rate at which this machine multiplies matrices, against which MFU is told.

use std::time::{Duration, Instant};

use flowhn_torch::{DeviceProperties, catch};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::Result;

/// A measured matmul rate.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MatmulRate {
    /// Floating-point operations a second, a multiply-add counted as two.
    pub flops_per_s: f64,
    /// What it was measured on, for reports: `"CPU, 2 threads, fp32 matmul of 1024^3"`.
    pub name: String,
}

impl MatmulRate {
    /// Multiplies square matrices for about a third of a second and takes the best time: 1024 wide on the CPU, 8192 on a GPU.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] where the device cannot hold the matrices or multiply in that type.
    pub fn measure(device: Device, kind: Kind) -> Result<Self> {
        let width: i64 = if device.is_cuda() { 8192 } else { 1024 };
        let flops = 2. * (width as f64).powi(3);
        let seconds = catch(|| {
            tch::no_grad(|| {
                // Random values: on a GPU, equal ones draw less power and so multiply faster than real data.
                let a = Tensor::randn([width, width], (kind, device));
                let mut product = a.matmul(&a);
                wait(&product);
                let (start, mut best) = (Instant::now(), f64::INFINITY);
                while start.elapsed() < Duration::from_millis(300) {
                    let lap = Instant::now();
                    product = a.matmul(&a);
                    wait(&product);
                    best = best.min(lap.elapsed().as_secs_f64());
                }
                Ok(best)
            })
        })?;
        let kind_name = if kind == Kind::BFloat16 { "bf16" } else { "fp32" };
        let name = format!("{}, {kind_name} matmul of {width}^3", device_name(device));
        Ok(Self { flops_per_s: flops / seconds, name })
    }
}

/// A device as reports call it.
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cpu => match tch::get_num_threads() {
            1 => "CPU, 1 thread".to_owned(),
            n => format!("CPU, {n} threads"),
        },
        Device::Cuda(idx) => {
            DeviceProperties::of(idx).map_or_else(|_| format!("CUDA device {idx}"), |device| device.name.clone())
        }
        other => format!("{other:?}"),
    }
}

/// Waits until the device has made this tensor.
fn wait(tensor: &Tensor) {
    if let Device::Cuda(idx) = tensor.device() {
        tch::Cuda::synchronize(idx as i64);
    }
}

/// Most memory used so far: tensors on a CUDA device, the process's resident set on the CPU; 0 where the system does not tell.
pub fn max_memory_bytes(device: Device) -> u64 {
    match device {
        Device::Cuda(idx) => flowhn_torch::MemoryStats::of(idx).map_or(0, |stats| stats.allocated_peak_bytes),
        _ => resident_peak_bytes().unwrap_or(0),
    }
}

fn resident_peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_positive_and_says_what_it_is() {
        let rate = MatmulRate::measure(Device::Cpu, Kind::Float).unwrap();
        // Any machine that runs this manages a hundred million, and none yet a hundred trillion on its CPU.
        assert!((1e8..1e14).contains(&rate.flops_per_s), "{rate:?}");
        assert!(rate.name.contains("CPU") && rate.name.contains("fp32") && rate.name.contains("1024"));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn resident_memory_is_told() {
        assert!(max_memory_bytes(Device::Cpu) > 1 << 20);
    }
}
