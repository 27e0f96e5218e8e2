//! `flowhn selftest`.

use std::panic;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use flowhn_torch::testing::{Case, Outcome};
use flowhn_torch::{Flag, catch};
use serde::Serialize;
use tch::Device;

use crate::console;
use crate::device::DeviceArgs;
use crate::threads;

const AFTER_HELP: &str = "\
On a CUDA device libtorch fills new memory with NaN first, so that what a kernel leaves unwritten shows. An error of the device
ends the test: nothing runs there any more.

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
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What came of all cases.
#[derive(Debug, Serialize)]
struct Report {
    device: String,
    cases: Vec<Row>,
    passed: usize,
    failed: usize,
    not_run: usize,
}

/// What came of one case.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    outcome: Verdict,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    seconds: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Passed,
    Failed,
    NotRun,
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
    let mut cases = chosen(&args.filter);
    if cases.is_empty() {
        bail!("no case has {} in its name; `flowhn selftest --list` shows all", args.filter.join(" or "));
    }
    if args.list {
        let names: Vec<&str> = cases.iter().map(|(name, _)| name.as_str()).collect();
        match args.json {
            true => console::print_json(&names)?,
            false => console::print(&(names.join("\n") + "\n"))?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    threads::let_sleep_and_repeat();
    let device = args.device.device()?;
    cases.retain(|(_, case)| case.runs_on(device));
    if cases.is_empty() {
        bail!("none of these cases runs on {device:?}; --device cuda");
    }
    if device.is_cuda() {
        fill_new_memory_with_nan()?;
    }
    // A panic is a failure of its case, whichever thread it is on; the program goes on.
    panic::set_hook(Box::new(|info| eprintln!("{info}")));

    let mut report =
        Report { device: format!("{device:?}"), cases: Vec::new(), passed: 0, failed: 0, not_run: cases.len() };
    let mut lost = None;
    for (name, case) in &cases {
        let (row, alive) = check(name, case, device);
        report.count(row.outcome);
        if !args.json {
            console::print(&line(&row))?;
        }
        report.cases.push(row);
        if let Err(error) = alive {
            lost = Some(error);
            break;
        }
    }
    finish(args, &report, lost)
}

impl Report {
    /// Counts a case that was not run so far.
    fn count(&mut self, outcome: Verdict) {
        let counter = match outcome {
            Verdict::Passed => &mut self.passed,
            Verdict::Failed => &mut self.failed,
            Verdict::NotRun => return,
        };
        *counter += 1;
        self.not_run -= 1;
    }
}

/// The cases with their full names that any of `filters` chooses.
fn chosen(filters: &[String]) -> Vec<(String, Case)> {
    let all = CRATES
        .into_iter()
        .flat_map(|(krate, cases)| cases().into_iter().map(move |case| (format!("{krate}/{}", case.name), case)));
    all.filter(|(name, _)| filters.is_empty() || filters.iter().any(|text| name.contains(text.as_str()))).collect()
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
    (row(name, outcome, seconds), alive)
}

fn row(name: &str, outcome: Result<Outcome, String>, seconds: f64) -> Row {
    let (outcome, detail, error) = match outcome {
        Ok(Outcome::Passed(found)) => (Verdict::Passed, Some(found), None),
        Ok(Outcome::NotRun(reason)) => (Verdict::NotRun, Some(reason), None),
        Err(error) => (Verdict::Failed, None, Some(error)),
    };
    Row { name: name.to_owned(), outcome, detail, error, seconds }
}

fn line(row: &Row) -> String {
    let Row { name, seconds, .. } = row;
    match (row.outcome, row.detail.as_deref().unwrap_or_default()) {
        (Verdict::Failed, _) => {
            let error = row.error.as_deref().unwrap_or_default();
            let error: Vec<&str> = error.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
            format!("FAIL {name}: {}  {seconds:.2} s\n", error.join("; "))
        }
        (Verdict::NotRun, reason) => format!("--   {name}  not run: {reason}  {seconds:.2} s\n"),
        (Verdict::Passed, "") => format!("ok   {name}  {seconds:.2} s\n"),
        (Verdict::Passed, detail) => format!("ok   {name}  {detail}  {seconds:.2} s\n"),
    }
}

fn finish(args: &Args, report: &Report, lost: Option<String>) -> Result<ExitCode> {
    let Report { device, passed, failed, not_run, .. } = report;
    let seconds: f64 = report.cases.iter().map(|row| row.seconds).sum();
    match args.json {
        true => console::print_json(report)?,
        false => {
            console::print(&format!("{device}: {passed} passed, {failed} failed, {not_run} not run; {seconds:.1} s\n"))?
        }
    }
    if let Some(error) = lost {
        let n_left = not_run - report.cases.iter().filter(|row| row.outcome == Verdict::NotRun).count();
        bail!("the device is lost after a failed case, {n_left} cases were left: {error}");
    }
    match failed {
        0 => Ok(ExitCode::SUCCESS),
        1 => bail!("one case failed"),
        n => bail!("{n} cases failed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_that_stands_aside_is_neither_passed_nor_failed() {
        let outcomes = [
            Ok(Outcome::Passed(String::new())),
            Ok(Outcome::NotRun("it takes 60 GiB".to_owned())),
            Err("off\n\n by one\n".to_owned()),
            Ok(Outcome::Passed("9 % of the allowance".to_owned())),
        ];
        let mut report = Report { device: String::new(), cases: Vec::new(), passed: 0, failed: 0, not_run: 5 };
        for outcome in outcomes {
            let row = row("a", outcome, 1.);
            report.count(row.outcome);
            report.cases.push(row);
        }
        assert_eq!((report.passed, report.failed, report.not_run), (2, 1, 2), "one is still to come");
        let lines: Vec<String> = report.cases.iter().map(line).collect();
        assert_eq!(lines[0], "ok   a  1.00 s\n");
        assert_eq!(lines[1], "--   a  not run: it takes 60 GiB  1.00 s\n");
        assert_eq!(lines[2], "FAIL a: off; by one  1.00 s\n");
        assert_eq!(lines[3], "ok   a  9 % of the allowance  1.00 s\n");
        let json = serde_json::to_value(&report.cases[1]).unwrap();
        assert_eq!((json["outcome"].as_str(), json["detail"].as_str()), (Some("not_run"), Some("it takes 60 GiB")));
    }
}
