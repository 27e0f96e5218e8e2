//! `flowhn bench paper`: the table of the paper, row by row.

mod kept;
mod published;
mod report;
mod row;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use clap::builder::RangedU64ValueParser;
use flowhn_train::RunConfig;
use flowhn_train::peak::device_name;
use tch::Device;

use crate::config_args::{self, SetArgs};
use crate::console::{self, Console};
use crate::device::DeviceArgs;
use crate::eval::{TaskArgs, TaskFiles};
use crate::fail::INTERRUPTED;
use crate::interrupt::Interrupt;
use crate::threads;
use published::Published;
use report::Report;
use row::{Row, RowContext};

const AFTER_HELP: &str = "\
Each row is a model of configs/paper/SIZE: its training step is timed on random tokens, the model is trained on the given text, and the
result answers the tasks. All rows get the same text in the same order, the same number of tokens, and one definition of tokens a second
and MFU, which stands in the results. What is done is kept under --out and used again; a row that was interrupted goes on.

Under --out: table.md, table.csv, table.json, figure.svg, and a folder for each row with speed.json, train.json, eval.json and its run.

--json prints the contents of table.json: `definition`, `device`, `peak` {name, flops_per_s}, `size`, `train_tokens`, `eval` {tasks, limit},
`rows`: a list of {model, title, device, tokens_per_s, mfu, accuracy {task: fraction}, stderr {task}, average, acc {task}, acc_norm {task}, parameters,
tokens_per_step, step_ms, mfu_full_scores, max_memory_bytes, trained_tokens, epochs, val_bits_per_byte, train_tokens_per_s, tasks, published}.";

/// The rows in the paper's order: file, name.
const ROWS: [(&str, &str); 10] = [
    ("llama", "Llama"),
    ("mamba1", "Mamba-1"),
    ("mamba2", "Mamba-2"),
    ("jamba", "Jamba"),
    ("shm", "SHM"),
    ("hymba", "Hymba"),
    ("no_split", "No_Split"),
    ("ae_split", "AE_Split"),
    ("fa_split", "FA_Split"),
    ("fac_split", "FAC_Split"),
];

/// What is done for a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Phase {
    /// Timing the training step.
    Speed,
    /// Training on text.
    Train,
    /// Answering the tasks.
    Eval,
}

/// Arguments of `flowhn bench paper`.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The size: a folder of configs/paper
    #[arg(long, value_name = "SIZE", value_parser = ["tiny", "135m", "350m", "1b"])]
    size: String,
    /// Rows of the table, all ten by default
    #[arg(long, value_name = "ROW,...", value_delimiter = ',', value_parser = ROWS.map(|(name, _)| name))]
    rows: Vec<String>,
    /// Tokens to train each row on, by default what the paper's size asks for (1 or 2 billion; tiny: 61,440); 0 measures speed alone
    #[arg(long, value_name = "N")]
    train_tokens: Option<u64>,
    /// Leave this out, but for what is there from earlier; may be repeated
    #[arg(long, value_name = "PHASE", value_delimiter = ',')]
    skip: Vec<Phase>,
    /// Training text instead of the configuration's: .jsonl, .jsonl.zst, .txt, .txt.zst, or token shards (.tokens); may be repeated
    #[arg(long, value_name = "FILE", num_args = 1..)]
    data: Vec<PathBuf>,
    /// Validation text; without it, a share of the training documents is held out
    #[arg(long, value_name = "FILE", num_args = 1..)]
    valid: Vec<PathBuf>,
    /// The tokenizer of the text
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Tasks to answer: names of files in the folder --eval-data, files, or `all`
    #[arg(long, value_name = "TASK,...", value_delimiter = ',', default_value = "all")]
    tasks: Vec<String>,
    #[command(flatten)]
    files: TaskFiles,
    /// Training steps to time, by default 30 on a GPU and 12 on the CPU
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<u64>::new().range(1..))]
    steps: Option<u64>,
    #[command(flatten)]
    sets: SetArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Where everything is kept, instead of runs/paper-SIZE
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

/// Fills the table row by row, and writes it anew after each.
pub fn run(args: &Args) -> Result<ExitCode> {
    threads::let_sleep();
    flowhn_torch::keep_freed_host_memory();
    let console = Console::new();
    let device = args.device.device()?;
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from(format!("runs/paper-{}", args.size)));
    let published = Published::shipped()?;
    let train_tokens = args.train_tokens.unwrap_or(match args.size.as_str() {
        "tiny" => 61_440,
        "1b" => 2_000_000_000,
        _ => 1_000_000_000,
    });
    let does = |phase| !args.skip.contains(&phase) && (phase == Phase::Speed || train_tokens > 0);

    // What is misspelt or missing shows before the first row.
    let options = TaskArgs { files: args.files.clone(), batch_size: None, eot_first: false };
    let tasks = if train_tokens > 0 { options.load(&args.tasks)? } else { Vec::new() };
    let chosen: Vec<_> = ROWS.iter().filter(|(name, _)| args.rows.is_empty() || is_in(&args.rows, name)).collect();
    let configs = chosen.iter().map(|(name, _)| config(args, name, &out, train_tokens)).collect::<Result<Vec<_>>>()?;
    if does(Phase::Train) {
        check_text(args, &configs[0])?;
    }
    fs::create_dir_all(&out)
        .with_context(|| format!("{}: cannot be made; name another folder with --out", out.display()))?;

    let interrupt = Interrupt::install(&console)?;
    let context = RowContext {
        console: &console,
        device,
        steps: args.steps.unwrap_or(if device.is_cuda() { 30 } else { 12 }),
        tasks: &tasks,
        options: &options,
        interrupt: &interrupt,
        out: &out,
    };
    let mut report = Report::new(&args.size, device_name(device), train_tokens, &tasks, args.files.limit);
    for ((name, title), config) in chosen.into_iter().zip(&configs) {
        console.line(format_args!("== {title} =="));
        let mut row = Row::new(name, title, published.of(&args.size, name));
        let done = context.speed(config, &mut row, does(Phase::Speed))?
            && context.train(config, &mut row, does(Phase::Train))?
            && context.eval(config, &mut row, does(Phase::Eval))?;
        if !done {
            console.line("stopped; the same command goes on from here");
            return Ok(ExitCode::from(INTERRUPTED));
        }
        report.rows.push(row);
        // After each row, so that a machine that goes away leaves a table of what was done.
        report.write(&out)?;
    }
    if args.json {
        console::print_json(&report)?;
    } else {
        console::print(&format!(
            "{}\n{}: table.md, table.csv, table.json, figure.svg\n",
            report.markdown(),
            out.display()
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn is_in(rows: &[String], name: &str) -> bool {
    rows.iter().any(|row| row == name)
}

/// The configuration of a row: its file, the text of the command line, and the same training for all.
fn config(args: &Args, row: &str, out: &Path, train_tokens: u64) -> Result<RunConfig> {
    let file = PathBuf::from(format!("configs/paper/{}/{row}.toml", args.size));
    let mut config = config_args::load(&file, &args.sets.sets)?;
    let data = &mut config.data;
    if !args.data.is_empty() {
        data.train.clone_from(&args.data);
    }
    if !args.valid.is_empty() {
        data.valid.clone_from(&args.valid);
        data.valid_frac = 0.;
    }
    if let Some(tokenizer) = &args.tokenizer {
        data.tokenizer.clone_from(tokenizer);
    }
    let train = &mut config.train;
    let tokens_per_step = (train.batch_size * train.grad_accum * config.model.seq_len) as u64;
    train.steps = train_tokens.div_ceil(tokens_per_step).max(1);
    train.eval_every = 0;
    train.checkpoint_every = (train.steps / 10).clamp(1, 500);
    train.keep_last = 1;
    // Bits that are the same in every run cost attention's faster kernels, which the programs one compares with use.
    train.deterministic =
        args.sets.sets.iter().any(|set| set.starts_with("train.deterministic=")) && train.deterministic;
    config.run.dir = out.join(row).join("run");
    Ok(config)
}

fn check_text(args: &Args, config: &RunConfig) -> Result<()> {
    let data = &config.data;
    let files = data.train.iter().chain(&data.valid).chain([&data.tokenizer]);
    if data.train.is_empty() || data.tokenizer.as_os_str().is_empty() {
        bail!(
            "configs/paper/{} names no text to train on: name it with --data FILE... and --tokenizer FILE, or measure speed alone with \
             --train-tokens 0",
            args.size
        );
    }
    match files.into_iter().find(|file| !file.is_file()) {
        Some(file) => bail!("{}: there is no such file to train with", file.display()),
        None => Ok(()),
    }
}

/// Frees what the row before has left in the allocator of a GPU.
fn forget_memory(device: Device) -> Result<()> {
    if device.is_cuda() {
        flowhn_torch::MemoryStats::empty_cache()?;
    }
    Ok(())
}
