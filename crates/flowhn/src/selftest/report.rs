//! What came of the cases, as lines and as JSON.

use std::process::ExitCode;

use anyhow::{Result, bail};
use flowhn_torch::testing::Outcome;
use serde::{Deserialize, Serialize};

use crate::console;

/// What came of all cases.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Report {
    device: String,
    pub cases: Vec<Row>,
    passed: usize,
    failed: usize,
    not_run: usize,
}

/// What came of one case.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Row {
    name: String,
    outcome: Verdict,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    seconds: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Passed,
    Failed,
    NotRun,
}

impl Report {
    /// A report on so many cases, none of which has run.
    pub fn new(device: String, n_cases: usize) -> Self {
        Self { device, cases: Vec::new(), passed: 0, failed: 0, not_run: n_cases }
    }

    /// Takes down a case, and prints its line unless the whole is to be JSON.
    pub fn add(&mut self, row: Row, json: bool) -> Result<()> {
        if !json {
            console::print(&row.line())?;
        }
        let counter = match row.outcome {
            Verdict::Passed => Some(&mut self.passed),
            Verdict::Failed => Some(&mut self.failed),
            Verdict::NotRun => None,
        };
        if let Some(counter) = counter {
            *counter += 1;
            self.not_run -= 1;
        }
        self.cases.push(row);
        Ok(())
    }

    /// Prints the sums, and tells whether all is well; `lost` is the error of a device on which nothing runs any more.
    pub fn finish(&self, json: bool, lost: Option<String>) -> Result<ExitCode> {
        let Self { device, passed, failed, not_run, .. } = self;
        let seconds: f64 = self.cases.iter().map(|row| row.seconds).sum();
        match json {
            true => console::print_json(self)?,
            false => console::print(&format!(
                "{device}: {passed} passed, {failed} failed, {not_run} not run; {seconds:.1} s of cases\n"
            ))?,
        }
        if let Some(error) = lost {
            let n_left = not_run - self.cases.iter().filter(|row| row.outcome == Verdict::NotRun).count();
            bail!("the device is lost after a failed case, {n_left} cases were left: {error}");
        }
        match failed {
            0 => Ok(ExitCode::SUCCESS),
            1 => bail!("one case failed"),
            n => bail!("{n} cases failed"),
        }
    }
}

impl Row {
    pub fn new(name: &str, outcome: Result<Outcome, String>, seconds: f64) -> Self {
        let (outcome, detail, error) = match outcome {
            Ok(Outcome::Passed(found)) => (Verdict::Passed, Some(found), None),
            Ok(Outcome::NotRun(reason)) => (Verdict::NotRun, Some(reason), None),
            Err(error) => (Verdict::Failed, None, Some(error)),
        };
        Self { name: name.to_owned(), outcome, detail, error, seconds }
    }

    /// Whether it tells of the case of this name.
    pub fn is_of(&self, name: &str) -> bool {
        self.name == name
    }

    fn line(&self) -> String {
        let Self { name, seconds, .. } = self;
        match (self.outcome, self.detail.as_deref().unwrap_or_default()) {
            (Verdict::Failed, _) => {
                let error = self.error.as_deref().unwrap_or_default();
                let error: Vec<&str> = error.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
                format!("FAIL {name}: {}  {seconds:.2} s\n", error.join("; "))
            }
            (Verdict::NotRun, reason) => format!("--   {name}  not run: {reason}  {seconds:.2} s\n"),
            (Verdict::Passed, "") => format!("ok   {name}  {seconds:.2} s\n"),
            (Verdict::Passed, detail) => format!("ok   {name}  {detail}  {seconds:.2} s\n"),
        }
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
        let mut report = Report::new("Cpu".to_owned(), 5);
        for outcome in outcomes {
            report.add(Row::new("a", outcome, 1.), true).unwrap();
        }
        assert_eq!((report.passed, report.failed, report.not_run), (2, 1, 2), "one is still to come");
        let lines: Vec<String> = report.cases.iter().map(Row::line).collect();
        assert_eq!(lines[0], "ok   a  1.00 s\n");
        assert_eq!(lines[1], "--   a  not run: it takes 60 GiB  1.00 s\n");
        assert_eq!(lines[2], "FAIL a: off; by one  1.00 s\n");
        assert_eq!(lines[3], "ok   a  9 % of the allowance  1.00 s\n");
        let json = serde_json::to_value(&report.cases[1]).unwrap();
        assert_eq!((json["outcome"].as_str(), json["detail"].as_str()), (Some("not_run"), Some("it takes 60 GiB")));
    }
}
