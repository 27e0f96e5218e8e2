//! `flowhn selftest`.

mod jobs;
mod report;

use std::io;
use std::num::NonZeroUsize;
use std::panic;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use flowhn_torch::testing::Case;
use flowhn_torch::{Flag, catch};
use tch::Device;

use crate::console;
use crate::device::DeviceArgs;
use crate::threads;
use jobs::Jobs;
use report::{Report, Row};

const AFTER_HELP: &str = "\
On a CUDA device libtorch fills new memory with NaN first, so that what a kernel leaves unwritten shows. An error of the device
ends the test: nothing runs there any more. With --jobs it ends the cases of its process. Where FLOWHN_KERNEL_TRACE=DIR asks for a record
of launches, the processes of --jobs write theirs to DIR.1, DIR.2 and so on.

--json prints one object: `device`; `cases`, a list of {name, outcome: passed, failed or not_run, detail or error, seconds};
`passed`; `failed`; `not_run`, cases that say why they cannot run here and those that a lost device left.";

/// Arguments of `flowhn selftest`.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    #[command(flatten)]
    device: DeviceArgs,
    /// Run only the cases whose names contain this text; may be repeated
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// List the names of the cases and run none
    #[arg(long)]
    list: bool,
    /// Run so many processes side by side, with a part of the cases each, which on a GPU take 2 to 5 GiB of its memory each; cases that take
    /// most of a device follow alone
    #[arg(long, value_name = "N", default_value = "1")]
    jobs: NonZeroUsize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Run exactly the cases whose names are the lines of standard input
    #[arg(long, hide = true)]
    names_from_stdin: bool,
}

/// What gives the cases of a crate.
type Cases = fn() -> Vec<Case>;

/// The crates with their cases, lowest first: what fails first is nearest to the cause.
const CRATES: [(&str, Cases); 7] = [
    ("torch", flowhn_torch::selftest::cases),
    ("nn", flowhn_nn::selftest::cases),
    ("ssm", flowhn_ssm::selftest::cases),
    ("attn", flowhn_attn::selftest::cases),
    ("fuse", flowhn_fuse::selftest::cases),
    ("model", flowhn_model::selftest::cases),
    ("train", flowhn_train::selftest::cases),
];

/// Runs the cases, or lists them.
pub fn run(args: &Args) -> Result<ExitCode> {
    if !args.list {
        // It may begin again, so nothing has been read yet.
        threads::let_sleep_and_repeat();
    }
    let mut cases = chosen(args)?;
    if args.list {
        let names: Vec<&str> = cases.iter().map(|(name, _)| name.as_str()).collect();
        match args.json {
            true => console::print_json(&names)?,
            false => console::print(&(names.join("\n") + "\n"))?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    let device = args.device.device()?;
    cases.retain(|(_, case)| case.runs_on(device));
    if cases.is_empty() {
        bail!("none of these cases runs on {device:?}; --device cuda");
    }
    let mut report = Report::new(format!("{device:?}"), cases.len());
    if args.jobs.get() > 1 {
        let together: Vec<&str> =
            cases.iter().filter(|(_, case)| !case.is_alone()).map(|(name, _)| name.as_str()).collect();
        Jobs::new(args.jobs.get(), device)?.run(&together, &mut |row| report.add(row, args.json))?;
        cases.retain(|(_, case)| case.is_alone());
    }
    let lost = run_here(&cases, device, &mut |row| report.add(row, args.json))?;
    report.finish(args.json, lost)
}

/// Runs cases in this process. Returns the error of a device that is lost.
fn run_here(
    cases: &[(String, Case)],
    device: Device,
    take: &mut dyn FnMut(Row) -> Result<()>,
) -> Result<Option<String>> {
    if device.is_cuda() {
        fill_new_memory_with_nan()?;
    }
    // A panic is a failure of its case, whichever thread it is on; the program goes on.
    panic::set_hook(Box::new(|info| eprintln!("{info}")));
    for (name, case) in cases {
        let (row, alive) = check(name, case, device);
        take(row)?;
        if let Err(error) = alive {
            return Ok(Some(error));
        }
    }
    Ok(None)
}

/// The cases that the arguments choose, with their full names.
///
/// # Errors
/// Where there is none.
fn chosen(args: &Args) -> Result<Vec<(String, Case)>> {
    let all = CRATES
        .into_iter()
        .flat_map(|(krate, cases)| cases().into_iter().map(move |case| (format!("{krate}/{}", case.name), case)));
    let cases: Vec<(String, Case)> = if args.names_from_stdin {
        let names = io::stdin().lines().collect::<io::Result<Vec<String>>>()?;
        all.filter(|(name, _)| names.contains(name)).collect()
    } else {
        let filters = &args.filter;
        all.filter(|(name, _)| filters.is_empty() || filters.iter().any(|text| name.contains(text.as_str()))).collect()
    };
    if cases.is_empty() {
        bail!("no case has {} in its name; `flowhn selftest --list` shows all", args.filter.join(" or "));
    }
    Ok(cases)
}

/// Every later allocation on a CUDA device holds NaN until something is written to it.
fn fill_new_memory_with_nan() -> Result<()> {
    // Filling is a part of this mode. It also makes attention take the algorithms of a deterministic run.
    Flag::Deterministic.set(true)?;
    Flag::DeterministicFill.set(true)?;
    Ok(())
}

/// Runs one case; the second result is the error of a device that is lost.
fn check(name: &str, case: &Case, device: Device) -> (Row, Result<(), String>) {
    let began = Instant::now();
    let outcome = case.run(device).map_err(|error| error.to_string());
    // What a kernel did wrong is told when the device is waited for, or never.
    let alive = match device {
        Device::Cuda(idx) => {
            let waited = catch(|| {
                tch::Cuda::synchronize(idx as i64);
                Ok(())
            });
            waited.map_err(|error| error.to_string())
        }
        _ => Ok(()),
    };
    let outcome = match (&alive, outcome) {
        (Err(error), Ok(_)) => Err(format!("the device failed afterwards: {error}")),
        (_, outcome) => outcome,
    };
    let seconds = began.elapsed().as_secs_f64();
    (Row::new(name, outcome, seconds), alive)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_name_is_that_of_one_case() {
        let mut names = HashSet::new();
        for (krate, cases) in CRATES {
            for case in cases() {
                assert!(names.insert(format!("{krate}/{}", case.name)), "{krate}/{} stands there twice", case.name);
            }
        }
    }
}
