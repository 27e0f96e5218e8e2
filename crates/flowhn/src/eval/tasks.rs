//! Accuracy on zero-shot tasks.

use std::fmt::Write as _;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::builder::RangedU64ValueParser;
use flowhn_train::checkpoint::Checkpoint;
use flowhn_train::observe::StopFlag;
use flowhn_train::storage::{Disk, write_atomically};
use flowhn_train::tasks::{Partial, Task, TaskOptions, TaskResult, TaskScore, evaluate_tasks, find_tasks};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::progress::EvalProgress;
use crate::checkpoint_args::Trained;
use crate::console::Console;
use crate::units::grouped;

/// Which items are scored.
#[derive(Clone, Debug, clap::Args)]
pub struct TaskFiles {
    /// The folder of the tasks' files; the one that ships holds 100 items of each
    #[arg(long, value_name = "DIR", default_value = "data/eval")]
    pub eval_data: PathBuf,
    /// Score the first N items of each task
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub limit: Option<usize>,
}

/// How tasks are scored.
#[derive(Clone, Debug, clap::Args)]
pub struct TaskArgs {
    #[command(flatten)]
    pub files: TaskFiles,
    /// Most texts that are computed at once, by default as many as suit the device; no score depends on it
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub batch_size: Option<usize>,
    /// Put the end-of-text token before each context, as before each document in training
    #[arg(long)]
    pub eot_first: bool,
}

impl TaskArgs {
    /// Reads the tasks' files.
    ///
    /// # Errors
    /// Where there is no such task, or a file is not one of items.
    pub fn load(&self, names: &[String]) -> Result<Vec<Task>> {
        let files = find_tasks(names, &self.files.eval_data)?;
        Ok(files.iter().map(|file| Task::load(file, self.files.limit)).collect::<Result<_, _>>()?)
    }

    fn options(&self) -> TaskOptions {
        TaskOptions { batch_size: self.batch_size, eot_first: self.eot_first }
    }
}

/// The part of `eval --json` that speaks of tasks.
#[derive(Debug, Serialize)]
pub struct TasksReport {
    /// The accuracy by which each task is reported.
    pub accuracy: Map<String, Value>,
    /// Everything about each.
    #[serde(rename = "tasks", serialize_with = "scores_alone")]
    pub results: Vec<TaskResult>,
    /// Whether the end-of-text token stood before each context.
    pub eot_first: bool,
    /// The file that holds the results.
    #[serde(rename = "results")]
    pub file: String,
}

fn scores_alone<S: Serializer>(results: &[TaskResult], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(results.iter().map(|result| &result.score))
}

/// Scores tasks; what is done is kept in a file beside `out`, which the caller removes once the results are safe. `None` where `stop`
/// was requested before the end.
///
/// # Errors
/// Those of the model, the items and the files.
pub fn score(
    trained: &Trained,
    tasks: &[Task],
    args: &TaskArgs,
    out: &Path,
    console: &Console,
    stop: Option<&StopFlag>,
) -> Result<Option<(TasksReport, Partial)>> {
    let path = partial_path(out);
    if let Some(dir) = out.parent() {
        fs::create_dir_all(dir)
            .with_context(|| format!("{}: cannot be made; name another file with --out", dir.display()))?;
    }
    let mut partial = Partial::open(&path, &fingerprint(trained))?;
    if !partial.is_empty() {
        let known = grouped(partial.len() as u64);
        console.line(format_args!("going on with {known} scores of an evaluation that was interrupted"));
    }
    let mut progress = EvalProgress::new(console, "texts");
    let mut on_progress = |done: usize, all: usize| {
        progress.report(done as u64, all as u64);
        match stop.is_some_and(StopFlag::is_requested) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    let (model, tokenizer) = (&trained.model, &trained.tokenizer);
    let results = evaluate_tasks(model, tokenizer, tasks, &args.options(), Some(&mut partial), &mut on_progress)?;
    drop(progress);
    let Some(results) = results else { return Ok(None) };
    let accuracy = results.iter().map(|result| (result.score.task.clone(), json!(result.score.accuracy))).collect();
    Ok(Some((TasksReport { accuracy, results, eot_first: args.eot_first, file: String::new() }, partial)))
}

/// What makes two evaluations give the same scores: weights, the type and the kind of device they are computed with, this program.
pub(super) fn fingerprint(trained: &Trained) -> String {
    let device = if trained.model.device().is_cuda() { "cuda" } else { "cpu" };
    let dtype = trained.config.train.dtype;
    format!("{} {dtype} {device} {}", trained.checkpoint.weights_hash(), env!("CARGO_PKG_VERSION"))
}

fn partial_path(out: &Path) -> PathBuf {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    out.with_file_name(format!(".{name}.partial"))
}

/// The file of the results of a checkpoint where none is named: in its run's directory.
pub fn default_out(checkpoint: &Checkpoint) -> PathBuf {
    // The path may be `.` or `step-5`, whose parents only the full path tells.
    let full = checkpoint.path().canonicalize().unwrap_or_else(|_| checkpoint.path().to_owned());
    let run = full.ancestors().nth(2).unwrap_or(&full);
    run.join(format!("eval-step-{}.json", checkpoint.progress().step))
}

/// Writes a value to a file, whole or not at all.
///
/// # Errors
/// Those of the file system.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    Ok(write_atomically(&Disk, path, text.as_bytes())?)
}

/// Writes what was found for each item.
///
/// # Errors
/// Those of the file system.
pub fn write_samples(path: &Path, results: &[TaskResult]) -> Result<()> {
    let mut text = String::new();
    for (task, item) in results.iter().flat_map(|result| result.items.iter().map(|item| (&result.score.task, item))) {
        let mut line = json!({"task": task});
        if let (Value::Object(line), Value::Object(item)) = (&mut line, serde_json::to_value(item)?) {
            line.extend(item);
        }
        writeln!(text, "{line}")?;
    }
    Ok(write_atomically(&Disk, path, text.as_bytes())?)
}

/// The results for people, a task a line.
pub fn table(report: &TasksReport) -> String {
    let mut text = format!(
        "\n{:<15} {:>6} {:>16} {:>16} {:>7} {:>9} {:>5}\n",
        "task", "items", "acc %", "acc_norm %", "chance", "majority", "ties"
    );
    let percent = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{:.1}", 100. * value));
    for TaskResult { score, .. } in &report.results {
        let with_error = |name: &str, value: Option<f64>, stderr: Option<f64>| {
            let stderr = stderr.map(|stderr| format!(" ± {:.2}", 100. * stderr)).unwrap_or_default();
            let mark = if name == score.metric { "*" } else { " " };
            value.map_or("-".to_owned(), |value| format!("{:.2}{stderr}{mark}", 100. * value))
        };
        let TaskScore { task, items, acc, acc_stderr, acc_norm, acc_norm_stderr, chance, majority, tied, cut, .. } =
            score;
        let _ = write!(
            text,
            "{task:<15} {items:>6} {:>16} {:>16} {:>7} {:>9} {tied:>5}",
            with_error("acc", Some(*acc), *acc_stderr),
            with_error("acc_norm", *acc_norm, *acc_norm_stderr),
            percent(*chance),
            percent(*majority),
        );
        if let Some(perplexity) = score.perplexity {
            let stderr = score.perplexity_stderr.map(|stderr| format!(" ± {stderr:.2}")).unwrap_or_default();
            let _ = write!(text, "  perplexity {perplexity:.2}{stderr}");
        }
        if *cut > 0 {
            let _ = write!(text, "  {cut} contexts cut");
        }
        text.push('\n');
    }
    text + "* by which the task is reported; ± one standard error\n"
}
