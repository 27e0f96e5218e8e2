//! Cases in several processes side by side: a device that one of them loses is not lost to the others.

use std::env;
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

use anyhow::{Context, Result, bail};
use flowhn_torch::kernel::TRACE_DIR;
use flowhn_torch::testing::Outcome;
use tch::Device;

use super::report::{Report, Row};

/// Cases of a process at most. It begins with some seconds for libtorch and the device.
const SHARE: usize = 24;
/// Processes that follow each other at least, where there are enough cases: some cases take long, and so would a last large share.
const ROUNDS: usize = 3;
/// The variables that tell libtorch and rayon how many cores are theirs.
const THREADS: [&str; 2] = ["OMP_NUM_THREADS", "RAYON_NUM_THREADS"];

/// How cases run in processes of their own.
pub(super) struct Jobs {
    program: PathBuf,
    device: Device,
    n_jobs: usize,
    /// Cores of each process.
    n_threads: usize,
    /// The folder in which this process records launches. The others take its name with their number.
    trace: Option<OsString>,
    n_started: AtomicUsize,
}

impl Jobs {
    /// This program again, `n_jobs` processes at a time.
    ///
    /// # Errors
    /// Where this program does not know where it is.
    pub fn new(n_jobs: usize, device: Device) -> Result<Self> {
        let program = env::current_exe().context("this program does not know its own path")?;
        let n_threads = thread::available_parallelism().map_or(1, |n| (n.get() / n_jobs).max(1));
        let trace = env::var_os(TRACE_DIR).filter(|dir| !dir.is_empty());
        Ok(Self { program, device, n_jobs, n_threads, trace, n_started: AtomicUsize::new(0) })
    }

    /// Runs the cases of these names, neighbours in one process; `take` gets what came of each, as it comes.
    ///
    /// # Errors
    /// Those of `take`, and where the program cannot be started or refuses to run.
    pub fn run(&self, names: &[&str], take: &mut dyn FnMut(Row) -> Result<()>) -> Result<()> {
        let shares = Mutex::new(names.chunks(names.len().div_ceil(ROUNDS * self.n_jobs).clamp(1, SHARE)));
        let next = || shares.lock().unwrap_or_else(PoisonError::into_inner).next();
        thread::scope(|scope| {
            let (sender, rows) = mpsc::channel();
            for _ in 0..self.n_jobs {
                let sender = sender.clone();
                scope.spawn(move || {
                    while let Some(names) = next() {
                        // Nobody listens where the others' results could not be told.
                        if sender.send(self.share(names)).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            for rows in rows {
                rows?.into_iter().try_for_each(&mut *take)?;
            }
            Ok(())
        })
    }

    /// Runs cases in a process of their own.
    fn share(&self, names: &[&str]) -> Result<Vec<Row>> {
        let mut process = self.command().spawn().context("cannot start a process")?;
        // It ends early where it refuses the names, and says why.
        let _ = process.stdin.take().map(|mut stdin| stdin.write_all(names.join("\n").as_bytes()));
        let output = process.wait_with_output().context("cannot wait for a process")?;
        let Ok(Report { mut cases, .. }) = serde_json::from_slice(&output.stdout) else {
            // What it said of itself is on standard error, which it shares.
            if output.status.code().is_some() && output.stdout.is_empty() {
                bail!("a process for {} cases ended with {} and told of none", names.len(), output.status);
            }
            return match names {
                [name] => {
                    let error =
                        format!("its process ended with {}; `flowhn selftest --filter` runs it alone", output.status);
                    Ok(vec![Row::new(name, Err(error), 0.)])
                }
                // One of them ended it, and took what was known of the others along.
                _ => names.iter().try_fold(Vec::new(), |mut rows, name| {
                    rows.extend(self.share(&[name])?);
                    Ok(rows)
                }),
            };
        };
        let is_left = |name: &&&str| !cases.iter().any(|row: &Row| row.is_of(name));
        let left = names.iter().filter(is_left).copied().collect::<Vec<_>>();
        let reason = || Ok(Outcome::NotRun("its process lost the device before".to_owned()));
        cases.extend(left.into_iter().map(|name| Row::new(name, reason(), 0.)));
        Ok(cases)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["selftest", "--json", "--names-from-stdin", "--device"]).arg(name_of(self.device));
        for name in THREADS.into_iter().filter(|name| env::var_os(name).is_none()) {
            command.env(name, self.n_threads.to_string());
        }
        if let Some(trace) = &self.trace {
            let mut dir = trace.clone();
            dir.push(format!(".{}", 1 + self.n_started.fetch_add(1, Ordering::Relaxed)));
            command.env(TRACE_DIR, dir);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command
    }
}

/// A device as `--device` takes it.
fn name_of(device: Device) -> String {
    match device {
        Device::Cuda(idx) => format!("cuda:{idx}"),
        _ => "cpu".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Passes each case but `a5`, which kills it, and ends before `a13` as if the device were lost. It notes where it would record.
    const PROGRAM: &str = r#"#!/bin/sh
echo "$FLOWHN_KERNEL_TRACE" >> "$(dirname "$0")/traces"
cases=
while read -r name || [ -n "$name" ]; do
    case "$name" in
        a5) kill -KILL $$ ;;
        a13) break ;;
    esac
    cases="$cases${cases:+,}{\"name\":\"$name\",\"outcome\":\"passed\",\"seconds\":1}"
done
echo "{\"device\":\"Cpu\",\"cases\":[$cases],\"passed\":0,\"failed\":0,\"not_run\":0}"
"#;

    /// Refuses to run.
    const REFUSES: &str = "#!/bin/sh\necho 'error: no device' >&2\nexit 1\n";

    /// Two jobs of a program that stands for this one.
    fn jobs(dir: &tempfile::TempDir, text: &str) -> Jobs {
        let program = dir.path().join("flowhn");
        fs::write(&program, text).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let trace = Some("there/trace".into());
        Jobs { program, device: Device::Cpu, n_jobs: 2, n_threads: 1, trace, n_started: AtomicUsize::new(0) }
    }

    #[test]
    fn a_case_that_ends_its_process_takes_no_other_along() {
        let dir = tempfile::tempdir().unwrap();
        // Six processes of eight cases.
        let names: Vec<String> = (0..48).map(|n| format!("a{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut rows = Vec::new();
        let mut take = |row| {
            rows.push(serde_json::to_value(row)?);
            Ok(())
        };
        jobs(&dir, PROGRAM).run(&names, &mut take).unwrap();

        rows.sort_by_key(|row| row["name"].as_str().map(|name| name[1..].parse::<usize>().unwrap()));
        let told: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
        assert_eq!(told, names, "each case is told of once");
        for (idx, row) in rows.iter().enumerate() {
            let want = match idx {
                5 => "failed",
                13..16 => "not_run",
                _ => "passed",
            };
            assert_eq!(row["outcome"], want, "{row}");
        }
        assert!(rows[5]["error"].as_str().unwrap().contains("signal: 9"), "{}", rows[5]);

        let traces = fs::read_to_string(dir.path().join("traces")).unwrap();
        let mut traces: Vec<&str> = traces.lines().collect();
        traces.sort_unstable();
        traces.dedup();
        assert_eq!(traces.len(), 6 + 8, "every process records into a folder of its own: {traces:?}");
        assert!(traces.iter().all(|dir| dir.starts_with("there/trace.")), "{traces:?}");
    }

    #[test]
    fn a_program_that_refuses_to_run_is_not_started_for_every_case() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = jobs(&dir, REFUSES);
        let refusal = jobs.run(&["a0", "a1", "a2"], &mut |_| Ok(())).unwrap_err().to_string();
        assert!(refusal.contains("exit status: 1"), "{refusal}");
        assert!(jobs.n_started.into_inner() <= 3);
    }
}
