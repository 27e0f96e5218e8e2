//! `--device`.

use std::str::FromStr;

use anyhow::{Result, bail};
use tch::Device;

/// Where to compute.
#[derive(Debug, clap::Args)]
pub struct DeviceArgs {
    /// Where to compute: cpu, cuda, or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: DeviceName,
}

/// Where to measure.
#[derive(Debug, clap::Args)]
pub struct BenchDeviceArgs {
    /// Where to compute: cpu, cuda, or cuda:N; the first GPU unless told otherwise, the CPU where there is none
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceName>,
}

/// A device as it is written.
#[derive(Clone, Copy, Debug, PartialEq)]
struct DeviceName(Device);

impl FromStr for DeviceName {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let device = match name.split_once(':') {
            None if name == "cpu" => Some(Device::Cpu),
            None if name == "cuda" => Some(Device::Cuda(0)),
            Some(("cuda", idx)) => idx.parse().ok().map(Device::Cuda),
            _ => None,
        };
        device.map(Self).ok_or("expected cpu, cuda, or cuda:N")
    }
}

impl DeviceArgs {
    /// The device, which is there.
    ///
    /// # Errors
    /// Where it is not.
    pub fn device(&self) -> Result<Device> {
        self.device.checked()
    }
}

impl BenchDeviceArgs {
    /// The device, which is there.
    ///
    /// # Errors
    /// Where the one that was named is not.
    pub fn device(&self) -> Result<Device> {
        self.device.map_or_else(|| Ok(Device::cuda_if_available()), DeviceName::checked)
    }
}

impl DeviceName {
    fn checked(self) -> Result<Device> {
        let Self(device) = self;
        if let Device::Cuda(idx) = device {
            let n_devices = if tch::Cuda::is_available() { tch::Cuda::device_count() } else { 0 };
            if n_devices == 0 {
                bail!("--device cuda: libtorch finds no CUDA device on this machine; use --device cpu");
            }
            if idx as i64 >= n_devices {
                bail!("--device cuda:{idx}: this machine has {n_devices} CUDA device(s), counted from 0");
            }
        }
        Ok(device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read() {
        let read = |name: &str| name.parse::<DeviceName>().map(|DeviceName(device)| device);
        assert_eq!(read("cpu"), Ok(Device::Cpu));
        assert_eq!(read("cuda"), Ok(Device::Cuda(0)));
        assert_eq!(read("cuda:3"), Ok(Device::Cuda(3)));
        assert!(["gpu", "cuda:", "cuda:x", "cpu:0", ""].into_iter().all(|name| read(name).is_err()));
    }
}
