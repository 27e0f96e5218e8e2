//! `--device`.

use std::str::FromStr;

use anyhow::{Result, bail};
use flowhn_torch::{CudaProblem, cuda_problem, n_cuda_devices};
use tch::Device;

use crate::console::Console;

/// Where to compute.
#[derive(Debug, clap::Args)]
pub struct DeviceArgs {
    /// Where to compute: cpu, cuda, or cuda:N; the first GPU unless told otherwise, the CPU where there is none
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceName>,
}

/// A device that was named.
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

/// A device as it is written.
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(idx) => format!("cuda:{idx}"),
        _ => "cpu".to_owned(),
    }
}

impl DeviceArgs {
    /// The device, which is there. Where no device is named and a GPU cannot be used, standard error says why, unless it is hidden.
    ///
    /// # Errors
    /// Where the one that was named is not.
    pub fn device(&self) -> Result<Device> {
        match self.device {
            Some(name) => name.checked(),
            None => match cuda_problem() {
                None if n_cuda_devices() > 0 => Ok(Device::Cuda(0)),
                None => Ok(Device::Cpu),
                Some(CudaProblem { message, is_hidden }) => {
                    if !is_hidden {
                        Console::new().line(format!("computing on the CPU: {message}"));
                    }
                    Ok(Device::Cpu)
                }
            },
        }
    }
}

impl DeviceName {
    fn checked(self) -> Result<Device> {
        let Self(device) = self;
        if let Device::Cuda(idx) = device {
            let n_devices = n_cuda_devices();
            if n_devices == 0 {
                let problem = cuda_problem().map_or("use --device cpu".to_owned(), |problem| problem.message);
                bail!("--device cuda: libtorch finds no CUDA device on this machine; {problem}");
            }
            if idx >= n_devices {
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
        assert!([Device::Cpu, Device::Cuda(2)].into_iter().all(|device| read(&device_name(device)) == Ok(device)));
        assert!(["gpu", "cuda:", "cuda:x", "cpu:0", ""].into_iter().all(|name| read(name).is_err()));
    }
}
