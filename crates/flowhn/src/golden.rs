//! `flowhn golden`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use flowhn_model::{GoldenReport, MAX_REL_GRAD, MAX_REL_OUTPUT, check_golden};
use flowhn_torch::catch;
use flowhn_train::{MAX_REL_STEP, check_golden_step};
use serde::Serialize;
use tch::Device;

use crate::console;
use crate::device::DeviceArgs;

/// Arguments of `flowhn golden`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Files of recorded outputs and gradients (.safetensors)
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON list with an object for each file; a number that is not finite is null
    #[arg(long)]
    json: bool,
}

/// What came of one file.
#[derive(Debug, Serialize)]
struct Row {
    file: String,
    max_rel_logits: Option<f64>,
    max_rel_hidden: Option<f64>,
    max_rel_grad: Option<f64>,
    /// Absent where the file records no step.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_rel_step: Option<f64>,
    pass: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Checks every file, whatever becomes of the others.
pub fn run(args: &Args) -> Result<ExitCode> {
    let device = args.device.device()?;
    let rows: Vec<Row> = args.files.iter().map(|file| check(file, device)).collect();
    match args.json {
        true => console::print_json(&rows)?,
        false => console::print(&table(&rows))?,
    }
    let n_failed = rows.iter().filter(|row| !row.pass).count();
    let unreadable: Vec<&str> = rows.iter().filter_map(|row| row.error.as_deref()).collect();
    match (n_failed, unreadable.as_slice()) {
        (0, _) => Ok(ExitCode::SUCCESS),
        (1, [error]) => bail!("{error}"),
        (n, []) => bail!("{n} of {} files differ by more than the limits", rows.len()),
        (n, errors) => bail!("{n} of {} files failed; {}", rows.len(), errors.join("; ")),
    }
}

fn check(file: &Path, device: Device) -> Row {
    let name = file.to_string_lossy().into_owned();
    // A panic of libtorch over one file must not keep the others from being checked.
    let outcome = catch(|| {
        let report = check_golden(file, device).map_err(|error| error.to_string());
        Ok(report.and_then(|report| Ok((report, check_golden_step(file).map_err(|error| error.to_string())?))))
    });
    let outcome = outcome.map_err(|error| error.to_string()).and_then(|inner| inner);
    match outcome {
        Ok((GoldenReport { max_rel_logits, max_rel_hidden, max_rel_grad, pass, .. }, max_rel_step)) => Row {
            file: name,
            max_rel_logits: Some(max_rel_logits),
            max_rel_hidden: Some(max_rel_hidden),
            max_rel_grad: Some(max_rel_grad),
            max_rel_step,
            pass: pass && max_rel_step.is_none_or(|error| error <= MAX_REL_STEP),
            error: None,
        },
        Err(message) => {
            let error = if message.contains(&name) { message } else { format!("{name}: {message}") };
            Row {
                file: name,
                max_rel_logits: None,
                max_rel_hidden: None,
                max_rel_grad: None,
                max_rel_step: None,
                pass: false,
                error: Some(error),
            }
        }
    }
}

fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.file.chars().count()).max().unwrap_or(0).max("limit".len());
    let line = |name: &str, numbers: [&str; 4], verdict: &str| {
        let [logits, hidden, grad, step] = numbers;
        format!("{name:<width$}  {logits:>9}  {hidden:>9}  {grad:>9}  {step:>9}  {verdict}").trim_end().to_owned()
            + "\n"
    };
    let mut text = line("largest relative error", ["logits", "hidden", "gradients", "step"], "");
    let limits = [MAX_REL_OUTPUT, MAX_REL_OUTPUT, MAX_REL_GRAD, MAX_REL_STEP].map(|limit| format!("{limit:.0e}"));
    text += &line("limit", limits.each_ref().map(String::as_str), "");
    for row in rows {
        let numbers = [row.max_rel_logits, row.max_rel_hidden, row.max_rel_grad, row.max_rel_step]
            .map(|number| number.map_or("-".to_owned(), |number| format!("{number:.1e}")));
        let verdict = match (row.pass, &row.error) {
            (true, _) => "pass",
            (false, None) => "FAIL",
            (false, Some(_)) => "FAIL: not checked",
        };
        text += &line(&row.file, numbers.each_ref().map(String::as_str), verdict);
    }
    text
}
