//! `flowhn bench context`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::builder::RangedU64ValueParser;
use flowhn_split::Branch;
use flowhn_train::bench::{Timing, time_steps};
use flowhn_train::plot::{Axes, Curve, curves_svg};
use serde::Serialize;

use crate::config_args::{self, SetArgs};
use crate::console::{self, Console};
use crate::device::BenchDeviceArgs;
use crate::units;

const AFTER_HELP: &str = "\
Trains the shape of configs/bench/SIZE/fac_split.toml at each length, with the same number of tokens in every step: once split as its FLOPs
balance, once with every token in attention (attn_frac = 1). Attention's cost grows with the length, the split's share of it shrinks. A sequence
is one document (--set data.reset_documents=true: as many as its text has, none of which attends to another).

--json prints one object: `device`, `tokens_per_step`, `rows`: a list of {seq_len, attn_frac, split_tokens_per_s, attention_tokens_per_s},
where attn_frac is the share of tokens that the balanced split gives to attention. --out also writes context.json, context.csv and
context.svg there.";

/// Arguments of `flowhn bench context`.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// A size in configs/bench
    #[arg(long, default_value = "1b")]
    size: String,
    /// Lengths to measure, in tokens
    #[arg(long, value_delimiter = ',', default_values_t = [1024, 2048, 4096, 8192, 16_384, 32_768, 65_536])]
    seq_len: Vec<usize>,
    /// Tokens of a step, at least the longest length
    #[arg(long, default_value_t = 65_536)]
    tokens: usize,
    /// Steps to measure at each length
    #[arg(long, default_value_t = 5, value_parser = RangedU64ValueParser::<u64>::new().range(1..))]
    steps: u64,
    /// Write context.json, context.csv and context.svg into this folder
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    sets: SetArgs,
    #[command(flatten)]
    device: BenchDeviceArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    device: String,
    tokens_per_step: usize,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    seq_len: usize,
    attn_frac: f64,
    split_tokens_per_s: f64,
    attention_tokens_per_s: f64,
}

/// Measures length by length.
pub fn run(args: &Args) -> Result<ExitCode> {
    let device = args.device.device()?;
    let console = Console::new();
    let mut report = Report { device: String::new(), tokens_per_step: args.tokens, rows: Vec::new() };
    if let Some(len) = args.seq_len.iter().find(|&&len| !args.tokens.is_multiple_of(len)) {
        anyhow::bail!("--seq-len {len} does not divide --tokens {}: every step has the same tokens", args.tokens);
    }
    for &seq_len in &args.seq_len {
        let mut speed = |attn_frac: &str| -> Result<(f64, f64)> {
            // Else attention sees no further than a document's start, however long the sequence.
            let mut sets = vec!["data.reset_documents=false".to_owned()];
            sets.extend(args.sets.sets.iter().cloned());
            sets.push(format!("model.seq_len={seq_len}"));
            sets.push(format!("train.batch_size={}", args.tokens / seq_len));
            sets.push(format!("model.split.attn_frac={attn_frac}"));
            let file = PathBuf::from(format!("configs/bench/{}/fac_split.toml", args.size));
            let config = config_args::load(&file, &sets)?;
            console.line(format!("{seq_len} tokens, attn_frac = {attn_frac}: {} steps", args.steps));
            let speed = time_steps(&config, device, Timing { steps: args.steps, power: false })?;
            report.device = speed.device;
            let plan = config.model.routing()?.plan(seq_len)?;
            Ok((speed.tokens_per_s, plan.blocks()[0].tokens(Branch::Attn) as f64 / seq_len as f64))
        };
        let (split_tokens_per_s, attn_frac) = speed("flops")?;
        let (attention_tokens_per_s, _) = speed("1.0")?;
        let row = Row { seq_len, attn_frac, split_tokens_per_s, attention_tokens_per_s };
        if !args.json {
            if report.rows.is_empty() {
                let columns = ["length", "attn_frac", "split tokens/s", "attention tokens/s"];
                let [a, b, c, d] = columns;
                console::print(&format!("{}\n{a:>8} {b:>10} {c:>15} {d:>19}\n", report.device))?;
            }
            console::print(&row.line())?;
        }
        report.rows.push(row);
        // Row by row: a longer one that does not fit takes none of them away.
        if let Some(dir) = &args.out {
            write(dir, &report, &args.size)?;
        }
    }
    if args.json {
        console::print_json(&report)?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Row {
    fn line(&self) -> String {
        let per_s = |value: f64| units::grouped(value as u64);
        let Self { seq_len, attn_frac, split_tokens_per_s, attention_tokens_per_s } = *self;
        format!(
            "{seq_len:>8} {attn_frac:>10.3} {:>15} {:>19}\n",
            per_s(split_tokens_per_s),
            per_s(attention_tokens_per_s)
        )
    }
}

fn write(dir: &Path, report: &Report, size: &str) -> Result<()> {
    let file = |name: &str| dir.join(name);
    let save = |path: &Path, text: &str| {
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make the folder {}", dir.display()))?;
    save(&file("context.json"), &format!("{}\n", serde_json::to_string_pretty(report)?))?;
    let mut csv = "seq_len,attn_frac,split_tokens_per_s,attention_tokens_per_s\n".to_owned();
    for row in &report.rows {
        let Row { seq_len, attn_frac, split_tokens_per_s, attention_tokens_per_s } = row;
        csv.push_str(&format!("{seq_len},{attn_frac},{split_tokens_per_s},{attention_tokens_per_s}\n"));
    }
    save(&file("context.csv"), &csv)?;
    let curve = |name: &str, value: fn(&Row) -> f64| Curve {
        name: name.to_owned(),
        points: report.rows.iter().map(|row| (row.seq_len as f64, value(row) / 1e3)).collect(),
    };
    let curves = [
        curve("balanced split", |row| row.split_tokens_per_s),
        curve("every token in attention", |row| row.attention_tokens_per_s),
    ];
    let title = format!("Training at {size}, {} tokens a step, {}", report.tokens_per_step, report.device);
    let axes = Axes { title: &title, x: "tokens of a sequence", y: "thousand tokens/s" };
    let path = file("context.svg");
    save(&path, &curves_svg(&path, axes, &curves)?)
}
