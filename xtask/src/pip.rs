//! One `pip install`, shown while it runs, its failures explained.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::cargo::stderr_as_stdout;
use crate::fail::{Fail, Result};
use crate::libtorch::VERSION;

/// How much of pip's complaints is kept to tell why it failed.
const TAIL_BYTES: usize = 16 * 1024;

/// How to install.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// What is there already may stay.
    Add,
    /// What is there already may be half of something: write all of it again.
    Rewrite,
}

/// Installs PyTorch with the Python of an environment. Downloads are unpacked in `scratch`.
pub fn install_torch(python: &Path, scratch: &Path, mode: Mode) -> Result<()> {
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-compile"]);
    if mode == Mode::Rewrite {
        pip.arg("--force-reinstall");
    }
    pip.arg(format!("torch=={VERSION}"));
    // Many machines keep /tmp in memory, too small for the downloads; the disk checked for room is this one.
    pip.env("TMPDIR", scratch).stdin(Stdio::null()).stdout(stderr_as_stdout()?).stderr(Stdio::piped());

    let cannot_run = |error| Fail::io(format_args!("run {} -m pip", python.display()), &error);
    let mut child = pip.spawn().map_err(cannot_run)?;
    let mut complaints = Vec::new();
    if let Some(mut stderr) = child.stderr.take() {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = stderr.read(&mut buffer) {
            // What cannot be shown is still kept for the explanation.
            let _ = std::io::stderr().write_all(&buffer[..count]);
            complaints.extend_from_slice(&buffer[..count]);
            let old = complaints.len().saturating_sub(TAIL_BYTES);
            complaints.drain(..old);
        }
    }
    let status = child.wait().map_err(cannot_run)?;
    if status.success() {
        return Ok(());
    }
    Err(explain(&String::from_utf8_lossy(&complaints), &status.to_string()))
}

/// Why pip failed, from what it wrote.
fn explain(complaints: &str, status: &str) -> Fail {
    let says = |words: &[&str]| words.iter().any(|word| complaints.contains(word));
    if says(&["No space left on device", "Disk quota exceeded"]) {
        return Fail::new("the disk became full while pip installed PyTorch")
            .help("make room (8 GB in all) and run the same command again: it starts the installation anew");
    }
    if says(&[
        "NewConnectionError",
        "ConnectTimeoutError",
        "ReadTimeoutError",
        "Max retries exceeded",
        "Temporary failure in name resolution",
        "Network is unreachable",
        "Connection refused",
        "Connection broken",
        "ProxyError",
        "SSLError",
        "HTTP error",
        "IncompleteRead",
    ]) {
        return Fail::new("pip could not download PyTorch: its package index cannot be reached").help(
            "check the network (behind a proxy set HTTPS_PROXY; a mirror of PyPI is set by PIP_INDEX_URL) and run\n\
             the same command again; or set LIBTORCH to an unpacked libtorch 2.11.0",
        );
    }
    if says(&["No matching distribution found"]) {
        return Fail::new(format!("pip found no package of PyTorch {VERSION} for this Python and machine")).help(
            "use Linux on x86-64 or aarch64 with CPython 3.10 to 3.14, or set LIBTORCH to an unpacked libtorch 2.11.0",
        );
    }
    Fail::new(format!("pip could not install PyTorch ({status}); its own words are above"))
        .help("run the same command again once that is mended: it starts the installation anew")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_has_its_own_remedy() {
        let cases = [
            (
                "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
                "disk became full",
            ),
            (
                "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)': /simple/torch/\n\
                 ERROR: Could not find a version that satisfies the requirement torch==2.11.0 (from versions: none)\n\
                 ERROR: No matching distribution found for torch==2.11.0",
                "cannot be reached",
            ),
            (
                "ERROR: Could not find a version that satisfies the requirement torch==2.11.0 (from versions: 2.4.0, 2.4.1)\n\
                 ERROR: No matching distribution found for torch==2.11.0",
                "no package of PyTorch 2.11.0",
            ),
            ("Traceback (most recent call last):\nImportError: no module", "its own words are above"),
        ];
        for (complaints, expected) in cases {
            let fail = explain(complaints, "exit status: 1").to_string();
            assert!(fail.contains(expected) && fail.contains("help: "), "{fail}");
        }
    }
}
