//! Cases in several processes side by side: a device that one of them loses is not lost to the others.

use std::env;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

use anyhow::{Context, Result};
use flowhn_torch::testing::Outcome;
use tch::Device;

use super::report::{Report, Row};

/// Cases of a process. It begins with some seconds for libtorch and the device.
const SHARE: usize = 24;
/// The variables that tell libtorch and rayon how many cores are theirs.
const THREADS: [&str; 2] = ["OMP_NUM_THREADS", "RAYON_NUM_THREADS"];

/// Runs the cases of these names, neighbours in one process, `n_jobs` processes at a time; `take` gets what came of each, as it comes.
///
/// # Errors
/// Those of `take`, and where this program cannot be started again.
pub(super) fn run(
    names: &[&str],
    n_jobs: usize,
    device: Device,
    take: &mut dyn FnMut(Row) -> Result<()>,
) -> Result<()> {
    let shares = Mutex::new(names.chunks(SHARE));
    let next = || shares.lock().unwrap_or_else(PoisonError::into_inner).next();
    let n_threads = thread::available_parallelism().map_or(1, |n| (n.get() / n_jobs).max(1));
    thread::scope(|scope| {
        let (sender, rows) = mpsc::channel();
        for _ in 0..n_jobs {
            let sender = sender.clone();
            scope.spawn(move || {
                while let Some(names) = next() {
                    // Nobody listens where the others' results could not be told.
                    if sender.send(share(names, device, n_threads)).is_err() {
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
fn share(names: &[&str], device: Device, n_threads: usize) -> Result<Vec<Row>> {
    let program = env::current_exe().context("this program does not know its own path")?;
    let mut command = Command::new(program);
    command.args(["selftest", "--json", "--names-from-stdin", "--device"]).arg(name_of(device));
    for name in THREADS.into_iter().filter(|name| env::var_os(name).is_none()) {
        command.env(name, n_threads.to_string());
    }
    let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start a process")?;
    // It ends early where it refuses the names, and says why.
    let _ = process.stdin.take().map(|mut stdin| stdin.write_all(names.join("\n").as_bytes()));
    let output = process.wait_with_output().context("cannot wait for a process")?;
    let Ok(Report { mut cases, .. }) = serde_json::from_slice(&output.stdout) else {
        return match names {
            [name] => Ok(vec![Row::new(name, Err(format!("its process ended with {}", output.status)), 0.)]),
            // One of them ended it, and took what was known of the others along.
            _ => names.iter().try_fold(Vec::new(), |mut rows, name| {
                rows.extend(share(&[name], device, n_threads)?);
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

/// A device as `--device` takes it.
fn name_of(device: Device) -> String {
    match device {
        Device::Cuda(idx) => format!("cuda:{idx}"),
        _ => "cpu".to_owned(),
    }
}
