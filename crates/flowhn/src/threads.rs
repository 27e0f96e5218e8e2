//! What libtorch's libraries must be told before they exist.

use std::env;
use std::ffi::OsStr;
use std::process::Command;

/// How idle OpenMP threads wait.
const WAIT_POLICY: (&str, &str) = ("OMP_WAIT_POLICY", "PASSIVE");
/// The workspace with which cuBLAS gives the same bits on every stream.
const CUBLAS_WORKSPACE: (&str, &str) = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8");

/// Lets libtorch's OpenMP threads sleep while they wait. By default they spin after every operator, on the cores that our own
/// kernels, or other programs, want next; on a busy machine that costs most of the speed.
///
/// OpenMP reads its settings when the program is loaded, so the program takes its own place with the setting in its
/// environment. A setting of the user's own stands.
pub fn let_sleep() {
    start_again_with(&[WAIT_POLICY]);
}

/// As [`let_sleep`], and makes cuBLAS deterministic, whatever runs beside it.
pub fn let_sleep_and_repeat() {
    start_again_with(&[WAIT_POLICY, CUBLAS_WORKSPACE]);
}

fn start_again_with(settings: &[(&str, &str)]) {
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        let missing = settings.iter().filter(|(name, _)| env::var_os(name).is_none());
        let missing: Vec<_> = missing.map(|(name, value)| (OsStr::new(name), OsStr::new(value))).collect();
        if let (false, Ok(program)) = (missing.is_empty(), env::current_exe()) {
            let mut args = env::args_os();
            let mut again = Command::new(program);
            again.arg0(args.next().unwrap_or_default()).args(args).envs(missing);
            // It returns only where it failed. Then the run is slower and no less right.
            let _ = again.exec();
        }
    }
}
