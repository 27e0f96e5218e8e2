//! Which CUDA devices there are, and why there are none.

use cudarc::driver::sys;

/// CUDA 13, which libtorch and NVRTC are of.
const CUDA: i32 = 13_000;

/// How many CUDA devices libtorch can use.
pub fn n_cuda_devices() -> usize {
    if tch::Cuda::is_available() { usize::try_from(tch::Cuda::device_count()).unwrap_or(0) } else { 0 }
}

/// Why libtorch finds no CUDA device, and what helps; `None` where nothing speaks for a GPU in this machine, or there is no such failure.
pub fn cuda_problem() -> Option<String> {
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    if n_cuda_devices() > 0 || visible.as_deref().is_some_and(str::is_empty) {
        return None;
    }
    let driver = driver_version()?;
    Some(problem(crate::BUILT_WITH_CUDA && tch::utils::has_cudart(), driver, visible.as_deref()))
}

/// The newest CUDA that the driver knows, as 1000 times the major version and 10 times the minor one; `None` without a driver.
fn driver_version() -> Option<i32> {
    let mut version = 0;
    // SAFETY: the driver's library is there when it is called; it writes one integer, whether initialised or not.
    let outcome = unsafe { sys::is_culib_present().then(|| sys::cuDriverGetVersion(&mut version)) }?;
    outcome.result().ok().map(|()| version)
}

fn problem(torch_has_cuda: bool, driver: i32, visible: Option<&str>) -> String {
    let (major, minor) = (driver / 1000, driver % 1000 / 10);
    match visible {
        _ if !torch_has_cuda => {
            "this machine has an NVIDIA driver, but libtorch is built without CUDA: install a CUDA 13 build of \
                                 PyTorch (`cargo xtask setup` does) and build anew"
                .to_owned()
        }
        _ if driver < CUDA => format!(
            "the NVIDIA driver knows CUDA up to {major}.{minor}; CUDA 13 needs driver 580 or newer: `nvidia-smi` shows yours"
        ),
        Some(visible) => format!("the NVIDIA driver shows no GPU: CUDA_VISIBLE_DEVICES is \"{visible}\""),
        None => "the NVIDIA driver shows no GPU: see what `nvidia-smi` says".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_problem_is_told_with_its_remedy() {
        let cases = [
            (false, 13_000, None, ["without CUDA", "cargo xtask setup"]),
            (true, 12_080, None, ["up to 12.8", "driver 580"]),
            (true, 13_010, Some("7"), ["no GPU", "CUDA_VISIBLE_DEVICES is \"7\""]),
            (true, 13_010, None, ["no GPU", "nvidia-smi"]),
        ];
        for (torch_has_cuda, driver, visible, words) in cases {
            let message = problem(torch_has_cuda, driver, visible);
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        }
    }
}
