//! Which CUDA devices there are, and why there are none.

use cudarc::driver::{result, sys};

use crate::DeviceProperties;
use crate::kernel::MIN_CAPABILITY;

/// CUDA 13, which libtorch and NVRTC are of.
const CUDA: i32 = 13_000;

/// How many CUDA devices libtorch sees, and this build can use.
pub fn n_cuda_devices() -> usize {
    let is_there = crate::BUILT_WITH_CUDA && tch::Cuda::is_available();
    if is_there { usize::try_from(tch::Cuda::device_count()).unwrap_or(0) } else { 0 }
}

/// Why nothing can be computed on the first GPU of a machine that has a GPU, or at least its driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaProblem {
    /// What is wrong, and what helps.
    pub message: String,
    /// Whether `CUDA_VISIBLE_DEVICES` hides all devices, as someone wanted.
    pub is_hidden: bool,
}

/// What keeps the first GPU from being used; `None` where it can be, and where nothing speaks for a GPU in this machine.
pub fn cuda_problem() -> Option<CudaProblem> {
    if n_cuda_devices() > 0 {
        let message = match DeviceProperties::of(0) {
            Ok(properties) if properties.compute_capability >= MIN_CAPABILITY => return None,
            Ok(properties) => too_old(properties),
            Err(error) => error.to_string(),
        };
        return Some(CudaProblem { message, is_hidden: false });
    }
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let has_cuda = crate::BUILT_WITH_CUDA && tch::utils::has_cudart();
    driver().map(|driver| driver.problem(has_cuda, visible.as_deref()))
}

/// That a device is older than the kernels.
pub(crate) fn too_old(properties: &DeviceProperties) -> String {
    let DeviceProperties { name, compute_capability, .. } = properties;
    let (major, minor) = (compute_capability / 10, compute_capability % 10);
    format!(
        "{name} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer, the CPU does without"
    )
}

/// What the driver says of itself.
struct Driver {
    /// The newest CUDA that it knows: 1000 times the major version and 10 times the minor one.
    cuda: i32,
    /// How many devices it sees.
    n_devices: Result<i32, String>,
}

fn driver() -> Option<Driver> {
    let mut cuda = 0;
    // SAFETY: the driver's library is there when it is called; it writes one integer, whether initialised or not.
    let outcome = unsafe { sys::is_culib_present().then(|| sys::cuDriverGetVersion(&mut cuda)) }?;
    outcome.result().ok()?;
    let n_devices = result::init().and_then(|()| result::device::get_count()).map_err(|error| error.to_string());
    Some(Driver { cuda, n_devices })
}

impl Driver {
    fn problem(&self, torch_has_cuda: bool, visible: Option<&str>) -> CudaProblem {
        let is_hidden = visible.is_some_and(|visible| ["", "-1"].contains(&visible.trim()));
        let (major, minor) = (self.cuda / 1000, self.cuda % 1000 / 10);
        let message = match (&self.n_devices, visible) {
            (_, Some(visible)) if is_hidden => format!("CUDA_VISIBLE_DEVICES hides all: it is \"{visible}\""),
            _ if !torch_has_cuda => {
                "this machine has an NVIDIA driver, but libtorch or this program is built without CUDA: install a \
                                     CUDA 13 build of PyTorch (`cargo xtask setup` does) and build anew"
                    .to_owned()
            }
            _ if self.cuda < CUDA => format!(
                "the NVIDIA driver knows CUDA up to {major}.{minor}; CUDA 13 needs driver 580 or newer: `nvidia-smi` shows yours"
            ),
            (Ok(0), Some(visible)) => {
                format!("the NVIDIA driver shows no GPU; CUDA_VISIBLE_DEVICES is \"{visible}\"")
            }
            (Ok(0), None) => "the NVIDIA driver shows no GPU: see what `nvidia-smi` says".to_owned(),
            (Ok(n), _) => format!("the NVIDIA driver shows {n} GPU(s), but libtorch finds none"),
            (Err(error), _) => format!("the NVIDIA driver does not start: {error}; see what `nvidia-smi` says"),
        };
        CudaProblem { message, is_hidden }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_problem_is_told_with_its_remedy() {
        let failed = || Err("system not yet initialized".to_owned());
        let cases = [
            (false, 13_000, Ok(0), None, ["without CUDA", "cargo xtask setup"]),
            (true, 12_080, Ok(1), None, ["up to 12.8", "driver 580"]),
            (true, 13_010, Ok(0), Some("7"), ["no GPU", "CUDA_VISIBLE_DEVICES is \"7\""]),
            (true, 13_010, Ok(0), None, ["no GPU", "nvidia-smi"]),
            (true, 13_010, failed(), Some("0"), ["not yet initialized", "nvidia-smi"]),
            (true, 13_010, Ok(2), None, ["2 GPU(s)", "libtorch finds none"]),
        ];
        for (torch_has_cuda, cuda, n_devices, visible, words) in cases {
            let CudaProblem { message, is_hidden } = Driver { cuda, n_devices }.problem(torch_has_cuda, visible);
            assert!(!is_hidden && words.iter().all(|word| message.contains(word)), "{message}");
        }
        for visible in ["", "-1"] {
            let problem = Driver { cuda: 13_000, n_devices: Ok(0) }.problem(true, Some(visible));
            assert!(problem.is_hidden && problem.message.contains("CUDA_VISIBLE_DEVICES"), "{problem:?}");
        }
    }
}
