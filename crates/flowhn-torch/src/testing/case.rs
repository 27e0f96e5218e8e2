//! Checks with names, so that the same ones run in `cargo test` on the CPU and in a program on any device.

use std::fmt;

use tch::Device;

use crate::{Error, MemoryStats, Result};

/// What a check that found nothing wrong says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It held; a few words on what was found, or none.
    Passed(String),
    /// It cannot be run here, and why.
    NotRun(String),
}

impl Outcome {
    /// What a check says that takes this much memory of a CUDA device where less is free, once nothing is cached any more.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another device, and those of asking.
    pub fn without_room(device: Device, n_bytes: u64) -> Result<Option<Self>> {
        let Device::Cuda(device_idx) = device else { return Err(Error::invalid("room", "not a CUDA device")) };
        MemoryStats::empty_cache()?;
        let free = MemoryStats::of(device_idx)?.free_bytes;
        let told = || format!("it takes {} GiB of device memory, {} are free", n_bytes >> 30, free >> 30);
        Ok((free < n_bytes).then(|| Self::NotRun(told())))
    }
}

impl From<String> for Outcome {
    fn from(found: String) -> Self {
        Self::Passed(found)
    }
}

/// What a [`Case`] runs.
type Check = Box<dyn Fn(Device) -> Result<Outcome> + Send + Sync>;

/// One check of an operation, on whatever device it is given.
pub struct Case {
    /// The name, `operation: circumstances`.
    pub name: String,
    only_cuda: bool,
    is_alone: bool,
    check: Check,
}

impl Case {
    /// A check that returns a few words on what it found, an [`Outcome`] where it may have to stand aside, or the error that names
    /// what is wrong.
    pub fn new<T: Into<Outcome>>(
        name: impl Into<String>,
        check: impl Fn(Device) -> Result<T> + Send + Sync + 'static,
    ) -> Self {
        let check = move |device| check(device).map(Into::into);
        Self { name: name.into(), only_cuda: false, is_alone: false, check: Box::new(check) }
    }

    /// A check of something that only a CUDA device has.
    pub fn on_cuda<T: Into<Outcome>>(
        name: impl Into<String>,
        check: impl Fn(Device) -> Result<T> + Send + Sync + 'static,
    ) -> Self {
        Self { only_cuda: true, ..Self::new(name, check) }
    }

    /// The same check, beside which nothing else runs: it takes most of a device's memory, or asks how much of it is free.
    #[must_use]
    pub fn alone(self) -> Self {
        Self { is_alone: true, ..self }
    }

    /// Whether nothing else runs beside it.
    pub fn is_alone(&self) -> bool {
        self.is_alone
    }

    /// Whether the check says anything about this device.
    pub fn runs_on(&self, device: Device) -> bool {
        device.is_cuda() || !self.only_cuda
    }

    /// Runs the check; a panic comes back as an error.
    ///
    /// # Errors
    /// What the check found wrong.
    pub fn run(&self, device: Device) -> Result<Outcome> {
        crate::catch(|| (self.check)(device))
    }
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Case").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Runs every case that the CPU can run.
///
/// # Panics
/// If one fails; the message holds all that do.
#[track_caller]
pub fn run_on_cpu(cases: &[Case]) {
    let cases: Vec<&Case> = cases.iter().filter(|case| case.runs_on(Device::Cpu)).collect();
    assert!(!cases.is_empty(), "there is no case");
    let failure = |case: &&Case| case.run(Device::Cpu).err().map(|error| format!("{}: {error}", case.name));
    let failures: Vec<String> = cases.iter().filter_map(failure).collect();
    assert!(failures.is_empty(), "{} of {} cases fail:\n{}", failures.len(), cases.len(), failures.join("\n"));
}
