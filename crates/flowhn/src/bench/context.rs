//! `flowhn bench context`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::builder::RangedU64ValueParser;
use flowhn_split::Branch;
use flowhn_train::bench::{Timing, time_steps};
use flowhn_train::plot::{Axes, Curve, curves_svg};
use serde::{Deserialize, Serialize};

use crate::config_args::{self, SetArgs};
use crate::console::{self, Console};
use crate::device::DeviceArgs;
use crate::units;

const AFTER_HELP: &str = "\
Trains the shape of configs/bench/SIZE/fac_split.toml at each length, with the same number of tokens in every step: once split as its FLOPs
balance, once with every token in attention (attn_frac = 1). Attention's cost grows with the length, the split's share of it shrinks. A sequence
is one document (--set data.reset_documents=true: as many as its text has, none of which attends to another).

--json prints one object: `device`, `size`, `tokens_per_step`, `rows`: a list of {seq_len, attn_frac, split_tokens_per_s,
attention_tokens_per_s}, where attn_frac is the share of tokens that the balanced split gives to attention, and `crossing`: the length from
which the split is the faster, between two rows on a line over the logarithm of the length; null where none is. --out also writes
context.json, context.csv and context.svg there, row by row. --from FILE writes these files from a report that was kept, and measures
nothing.";

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
    /// Take this report, an earlier context.json, instead of measuring
    #[arg(long, value_name = "FILE", requires = "out", conflicts_with_all = ["size", "seq_len", "tokens", "steps"])]
    from: Option<PathBuf>,
    #[command(flatten)]
    sets: SetArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Report {
    device: String,
    /// Absent from reports of earlier versions.
    #[serde(default)]
    size: String,
    tokens_per_step: usize,
    rows: Vec<Row>,
    /// The length from which the split is the faster.
    crossing: Option<f64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Row {
    seq_len: usize,
    attn_frac: f64,
    split_tokens_per_s: f64,
    attention_tokens_per_s: f64,
}

/// Measures length by length.
pub fn run(args: &Args) -> Result<ExitCode> {
    if let (Some(file), Some(dir)) = (&args.from, &args.out) {
        let mut report = read(file)?;
        report.crossing = crossing(&report.rows);
        write(dir, &report)?;
        return finish(args, &report);
    }
    let device = args.device.device()?;
    let console = Console::new();
    let mut report = Report {
        device: String::new(),
        size: args.size.clone(),
        tokens_per_step: args.tokens,
        rows: Vec::new(),
        crossing: None,
    };
    if let Some(len) = args.seq_len.iter().find(|&&len| !args.tokens.is_multiple_of(len)) {
        anyhow::bail!("--seq-len {len} does not divide --tokens {}: every step has the same tokens", args.tokens);
    }
    for &seq_len in &args.seq_len {
        let mut speed = |attn_frac: &str| -> Result<(f64, f64)> {
            // A sequence is one document: attention sees no further back than its document's start, however long the sequence.
            let mut sets = vec!["data.reset_documents=false".to_owned()];
            sets.extend(args.sets.sets.iter().cloned());
            sets.push(format!("model.seq_len={seq_len}"));
            sets.push(format!("train.batch_size={}", args.tokens / seq_len));
            sets.push(format!("model.split.attn_frac={attn_frac}"));
            let file = PathBuf::from(format!("configs/bench/{}/fac_split.toml", args.size));
            let config = config_args::load(&file, &sets)?;
            console.line(format!("{seq_len} tokens, attn_frac = {attn_frac}: {} steps", args.steps));
            let speed = time_steps(&config, device, Timing { steps: args.steps, details: false })?;
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
        report.crossing = crossing(&report.rows);
        // Row by row: a longer one that does not fit takes none of them away.
        if let Some(dir) = &args.out {
            write(dir, &report)?;
        }
    }
    finish(args, &report)
}

fn finish(args: &Args, report: &Report) -> Result<ExitCode> {
    match (args.json, report.crossing) {
        (true, _) => console::print_json(report)?,
        (false, Some(len)) => console::print(&format!("the split is the faster from {len:.0} tokens on\n"))?,
        (false, None) => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Where the curves cross for the last time, the split below attention to the left and above it from there on.
fn crossing(rows: &[Row]) -> Option<f64> {
    let lead = |row: &Row| ((row.seq_len as f64).ln(), row.split_tokens_per_s - row.attention_tokens_per_s);
    let mut leads: Vec<(f64, f64)> = rows.iter().map(lead).collect();
    leads.sort_by(|a, b| a.0.total_cmp(&b.0));
    let last_behind = leads.iter().rposition(|&(_, lead)| lead < 0.)?;
    let (left, right) = (leads[last_behind], *leads.get(last_behind + 1)?);
    Some((left.0 + (right.0 - left.0) * left.1 / (left.1 - right.1)).exp())
}

/// A report that was kept.
fn read(path: &Path) -> Result<Report> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read --from {}", path.display()))?;
    let want = "it takes a context.json that `flowhn bench context --out` wrote";
    serde_json::from_str(&text).with_context(|| format!("cannot read --from {}: {want}", path.display()))
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

fn write(dir: &Path, report: &Report) -> Result<()> {
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
    let title = format!("Training at {}, {} tokens a step, {}", report.size, report.tokens_per_step, report.device);
    let mark = report.crossing.map(|len| (len, format!("split faster from {len:.0}")));
    let mark = mark.as_ref().map(|(len, text)| (*len, text.as_str()));
    let axes = Axes { title: &title, x: "tokens of a sequence", y: "thousand tokens/s", mark };
    let path = file("context.svg");
    save(&path, &curves_svg(&path, axes, &curves)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_split_leads_from_the_crossing_on() {
        let row = |seq_len, split_tokens_per_s, attention_tokens_per_s| Row {
            seq_len,
            attn_frac: 0.5,
            split_tokens_per_s,
            attention_tokens_per_s,
        };
        let rows = [row(1024, 9., 10.), row(4096, 8., 9.), row(16_384, 7., 4.)];
        // A quarter of the way from 4096 to 16384 by their logarithms.
        assert!((crossing(&rows).unwrap() - 4096. * 2f64.sqrt()).abs() < 1e-6);
        let [a, b, c] = rows.each_ref().map(|r| row(r.seq_len, r.split_tokens_per_s, r.attention_tokens_per_s));
        assert_eq!(crossing(&[c, a, b]), crossing(&rows), "in any order");
        let falls_back = [row(1024, 9., 10.), row(4096, 9., 8.), row(16_384, 3., 4.)];
        assert_eq!(crossing(&falls_back), None);
        assert_eq!(crossing(&rows[..2]), None);
        assert_eq!(crossing(&rows[2..]), None);
    }
}
