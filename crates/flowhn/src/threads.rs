//! What libtorch's threads must be told before they exist.

use std::env;
use std::process::Command;

/// How idle OpenMP threads wait.
const WAIT_POLICY: &str = "OMP_WAIT_POLICY";

/// Lets libtorch's OpenMP threads sleep while they wait. By default they spin after every operator, on the cores that our own
/// kernels, or other programs, want next; on a busy machine that costs most of the speed.
///
/// OpenMP reads its settings when the program is loaded, so the program takes its own place with the setting in its
/// environment. A setting of the user's own stands.
pub fn let_sleep() {
    #[cfg(unix)]
    if env::var_os(WAIT_POLICY).is_none()
        && let Ok(program) = env::current_exe()
    {
        use std::os::unix::process::CommandExt;
        let mut args = env::args_os();
        let mut again = Command::new(program);
        again.arg0(args.next().unwrap_or_default()).args(args).env(WAIT_POLICY, "PASSIVE");
        // It returns only where it failed. Then the run is slower and no less right.
        let _ = again.exec();
    }
}
