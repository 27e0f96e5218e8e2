//! `flowhn eval`.

mod progress;
mod tasks;
mod text;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use flowhn_train::peak::device_name;
use serde::Serialize;

use crate::checkpoint_args::CheckpointArgs;
use crate::console::{self, Console};
use crate::threads;
use crate::units::grouped;

pub use tasks::{TaskArgs, TaskFiles, TasksReport, score, write_json};

const AFTER_HELP: &str = "\
--tasks scores questions by the likelihood of their choices, zero-shot. The files are JSON lines, one item a line (.jsonl, .jsonl.gz,
.jsonl.zst): {\"id\", \"context\", \"choices\": [..], \"answer\": index}, and \"suffix\" where the text after a choice is what is scored. What
does not fit into the model's length is cut off a context's left. What is scored is kept as it comes (of tasks beside the results, of text beside the
token shards), so an evaluation that was interrupted goes on when it is started again.

--json prints one object: checkpoint, step, device, seq_len, plan; with --data: data, tokens, bytes, loss, perplexity, bits_per_byte; with
--tasks: accuracy {task: fraction}, tasks: a list of {task, items, items_in_file, metric, accuracy, stderr, acc, acc_stderr, acc_norm,
acc_norm_stderr, chance, majority, perplexity, perplexity_stderr, tied, cut}, eot_first, results (the file that holds the same).";

/// Arguments of `flowhn eval`.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP, group = clap::ArgGroup::new("what").required(true).multiple(true).args(["data", "tasks"]))]
pub struct Args {
    #[command(flatten)]
    checkpoint: CheckpointArgs,
    /// Text to score: .jsonl, .jsonl.zst, .txt or .txt.zst; may be repeated
    #[arg(long, value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Tasks to score: names of files in the folder --eval-data, files, or `all`
    #[arg(long, value_name = "TASK,...", value_delimiter = ',')]
    tasks: Vec<String>,
    #[command(flatten)]
    options: TaskArgs,
    /// Where the results of tasks are written, instead of eval-step-N.json in the run's directory
    #[arg(long, value_name = "FILE", requires = "tasks")]
    out: Option<PathBuf>,
    /// Writes what was found for each item of the tasks as JSON lines
    #[arg(long, value_name = "FILE", requires = "tasks")]
    samples: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The object of `eval --json`.
#[derive(Debug, Serialize)]
struct Report {
    /// The checkpoint's directory.
    checkpoint: String,
    /// Steps it was trained for.
    step: u64,
    /// Where it computed.
    device: String,
    /// Tokens the model sees at once: the training length.
    seq_len: usize,
    /// The length for which the tokens were routed: `training` or, in the script's own form, `actual`.
    plan: &'static str,
    #[serde(flatten)]
    text: Option<text::TextReport>,
    #[serde(flatten)]
    tasks: Option<TasksReport>,
}

/// Scores every token of the text once, and every item of the tasks.
pub fn run(args: &Args) -> Result<ExitCode> {
    threads::let_sleep();
    let console = Console::new();
    // What is misspelt shows before the model is loaded.
    let tasks = (!args.tasks.is_empty()).then(|| args.options.load(&args.tasks)).transpose()?;
    let trained = args.checkpoint.load(&console)?;
    let text = (!args.data.is_empty()).then(|| text::score(&args.data, &trained, &console)).transpose()?;
    let mut report = Report {
        checkpoint: trained.checkpoint.path().display().to_string(),
        step: trained.checkpoint.progress().step,
        device: device_name(trained.model.device()),
        seq_len: trained.config.model.seq_len,
        plan: if trained.config.model.split.released { "actual" } else { "training" },
        text,
        tasks: None,
    };
    if let Some(tasks) = tasks {
        let out = args.out.clone().unwrap_or_else(|| tasks::default_out(&trained.checkpoint));
        let scored = score(&trained, &tasks, &args.options, &out, &console, None)?;
        let (mut scored, partial) = scored.context("the evaluation was stopped")?;
        if let Some(path) = &args.samples {
            tasks::write_samples(path, &scored.results)?;
        }
        scored.file = out.display().to_string();
        report.tasks = Some(scored);
        write_json(&out, &report)?;
        partial.remove()?;
    }
    if args.json {
        console::print_json(&report)?;
        return Ok(ExitCode::SUCCESS);
    }
    console::print(&format!("{} after {} steps", report.checkpoint, grouped(report.step)))?;
    if let Some(text) = &report.text {
        console::print(&text.told(report.seq_len, report.plan))?;
    }
    if let Some(tasks) = &report.tasks {
        console::print(&format!("{}results {}\n", tasks::table(tasks), tasks.file))?;
    }
    Ok(ExitCode::SUCCESS)
}
