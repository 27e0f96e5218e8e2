//! `flowhn selftest`.

use std::panic;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use flowhn_torch::testing::Case;
use flowhn_torch::{Flag, catch};
use serde::Serialize;
use tch::Device;

use crate::console;
use crate::device::DeviceArgs;
use crate::threads;

const AFTER_HELP: &str = "\
On a CUDA device libtorch fills new memory with NaN first, so that what a kernel leaves unwritten shows. An error of the device
ends the test: nothing runs there any more.

--json prints one object: `device`; `cases`, a list of {name, pass, detail or error, seconds}; `passed`; `failed`; `not_run`.";

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
    pass: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    seconds: f64,
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
        report.not_run -= 1;
        report.passed += usize::from(row.pass);
        report.failed += usize::from(!row.pass);
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
    let row = Row {
        name: name.to_owned(),
        pass: outcome.is_ok(),
        detail: outcome.as_ref().ok().cloned(),
        error: outcome.err(),
        seconds: began.elapsed().as_secs_f64(),
    };
    (row, alive)
}

fn line(row: &Row) -> String {
    let Row { name, seconds, .. } = row;
    match (&row.error, row.detail.as_deref().unwrap_or_default()) {
        (Some(error), _) => {
            let error: Vec<&str> = error.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
            format!("FAIL {name}: {}  {seconds:.2} s\n", error.join("; "))
        }
        (None, "") => format!("ok   {name}  {seconds:.2} s\n"),
        (None, detail) => format!("ok   {name}  {detail}  {seconds:.2} s\n"),
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
        bail!("the device is lost after a failed case, {not_run} cases were not run: {error}");
    }
    match failed {
        0 => Ok(ExitCode::SUCCESS),
        1 => bail!("one case failed"),
        n => bail!("{n} cases failed"),
    }
}
