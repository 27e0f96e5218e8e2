//! The public Python programs, timed in turns with ours by `benches/peers/kernels.py`, which stays loaded and is asked by name.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::timer::Samples;

/// The Python process.
pub struct Peers {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

/// What one program took for one pass, or why it did not run.
#[derive(Debug, Deserialize)]
pub struct Answer {
    /// The program.
    pub peer: String,
    /// `forward`, `backward` or `both`; empty with an absence.
    #[serde(default)]
    pub pass: String,
    /// Each time on the device, microseconds.
    #[serde(default)]
    pub device_us: Vec<f64>,
    /// Time on the host.
    #[serde(default)]
    pub wall_us: f64,
    /// Why there is no time.
    pub absent: Option<String>,
}

impl Peers {
    /// Starts the script with this Python.
    pub fn start(python: &Path, script: &Path, n: usize) -> Result<Self> {
        if !script.exists() {
            bail!("{} is not here: start in the repository's or the bundle's folder", script.display());
        }
        let mut command = Command::new(python);
        command.arg(script).args(["--serve", "--n", &n.to_string()]);
        // Our libtorch may be another build than that Python's.
        command.env_remove("LD_LIBRARY_PATH").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {}", python.display()))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("{} has no pipes", python.display());
        };
        Ok(Self { child, stdin: Some(stdin), stdout: BufReader::new(stdout) })
    }

    /// Times every program that has the operation, once.
    pub fn ask(&mut self, name: &str) -> Result<Vec<Answer>> {
        let stdin = self.stdin.as_mut().context("the peers are gone")?;
        writeln!(stdin, "{name}").and_then(|()| stdin.flush()).context("the peers' Python ended")?;
        let mut line = String::new();
        if self.stdout.read_line(&mut line)? == 0 {
            bail!("the peers' Python ended while it timed {name}");
        }
        serde_json::from_str(&line).with_context(|| format!("the peers' Python answered {line:?}"))
    }
}

impl Answer {
    /// The times.
    pub fn samples(&self) -> Samples {
        Samples { device_us: self.device_us.clone(), wall_us: vec![self.wall_us] }
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        // The end of its input ends it.
        drop(self.stdin.take());
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_times_or_absences() {
        let text = r#"[{"peer": "a", "pass": "forward", "device_us": [1.5, 2.0], "wall_us": 3},
                       {"peer": "b", "absent": "No module named 'b'"}]"#;
        let answers: Vec<Answer> = serde_json::from_str(text).unwrap();
        assert_eq!((answers[0].samples().spread().0, answers[0].pass.as_str()), (2., "forward"));
        assert!(answers[1].absent.as_deref().unwrap().contains("'b'") && answers[1].device_us.is_empty());
    }
}
