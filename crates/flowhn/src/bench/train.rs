//! `flowhn bench train`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::builder::RangedU64ValueParser;
use flowhn_train::bench::{PartTime, Power, StepActivity, StepSpeed, Timing, time_steps};
use flowhn_train::config::Dtype;
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::config_args::{self, SetArgs};
use crate::console::{self, Console};
use crate::device::DeviceArgs;
use crate::units;

use super::train_files::{self, Beside};

const AFTER_HELP: &str = "\
Each row trains a model from configs/bench on random tokens from token shards: loader, forward, backward, clipping, AdamW with its
schedule. A warm-up comes first. Model FLOPs are those of `flowhn plan`, forward and backward; attention's scores count as the causal
half (mfu) or as the whole square (mfu_full_scores). mfu is a fraction of the peak, which is named.

--json prints one object: `definition`, `device`, `peak` {name, flops_per_s}, `rows`: a list of {model, policy, parameters, tokens_per_step,
tokens_per_s, recomputed_flops_per_step (not in mfu), step_ms {median, min, max, all}, mfu, mfu_full_scores, matmul_frac, matmul {flops_per_s, name}, max_memory_bytes, host_ms,
last_loss, busy_frac, fp8_projections {in_fp8, of}, parts: a list of {name, ms}, activity {busy_frac, recorded_step_ms, recording_ms, kernels:
a list of {name, n_launches, ms}}, power {watts, limit_watts, held_back_frac, clock_mhz, max_clock_mhz}, joules_per_token}. With train.linears = \"fp8\", MFU stays a fraction of the bf16
peak. Parts come from steps of their own with marks between them and branches one after the other; `gaps` lies
between two steps. busy_frac is the share of the time in which a kernel or a copy runs, as CUPTI records it in three further steps (less
what recording takes), whose kernels `activity` lists; on the CPU it is the share of what does not lie between two steps. Power is what NVML tells of a GPU during further steps; held_back_frac is the share of that time in
which power or heat held its clock back.

--out also writes train.json (the same object), train.csv and train.svg (bars of tokens/s and MFU). --beside FILE puts another program's
speeds into the figure and the CSV: a JSON object {name, rows: a list of {model, policy, tokens_per_s, mfu}}, mfu a fraction. --from FILE
writes these files from a report that was kept, and measures nothing.";

const DEFINITION: &str =
    "tokens of a step over the median time of a step; model FLOPs of `flowhn plan`, forward and backward";

/// What the fastest steps are measured with.
const FAST: [&str; 5] = [
    "train.deterministic=false",
    "data.reset_documents=false",
    "train.optim_state=\"int8\"",
    "train.grads=\"bf16\"",
    "train.logits_mib=2048",
];

/// Arguments of `flowhn bench train`.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Sizes in configs/bench; may be repeated
    #[arg(long, value_name = "SIZE", default_values = ["135m", "350m", "1b"])]
    size: Vec<String>,
    /// Split policies in configs/bench/SIZE; may be repeated
    #[arg(long, value_name = "POLICY", default_values = ["ae_split"])]
    policy: Vec<String>,
    /// Measure this configuration instead of sizes and policies; may be repeated
    #[arg(long, value_name = "FILE")]
    config: Vec<PathBuf>,
    /// Ask neither for equal bits nor for documents apart, with the optimiser's means in int8, gradients of projections in bf16 and logits
    /// of 2 GiB; --set overrides these
    #[arg(long)]
    fast: bool,
    #[command(flatten)]
    sets: SetArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Whether a block's branches run one after the other or beside each other; `train.branches`
    #[arg(long, value_parser = ["serial", "streams"])]
    branches: Option<String>,
    /// Steps to measure
    #[arg(long, default_value_t = 30, value_parser = RangedU64ValueParser::<u64>::new().range(1..))]
    steps: u64,
    /// Write train.json, train.csv and train.svg into this folder
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Another program's speeds, to stand beside ours in the files of --out
    #[arg(long, value_name = "FILE", requires = "out")]
    beside: Option<PathBuf>,
    /// Take this report, an earlier train.json, instead of measuring
    #[arg(long, value_name = "FILE", requires = "out", conflicts_with_all = ["size", "policy", "config", "branches", "steps", "fast"])]
    from: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Report {
    definition: String,
    pub(super) device: String,
    pub(super) peak: Option<Peak>,
    pub(super) rows: Vec<Row>,
}

/// A rate that MFU refers to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Peak {
    pub(super) name: String,
    pub(super) flops_per_s: f64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) model: String,
    pub(super) policy: String,
    pub(super) parameters: u64,
    pub(super) tokens_per_step: u64,
    pub(super) tokens_per_s: f64,
    /// FLOPs that a step computes beside those that MFU counts.
    pub(super) recomputed_flops_per_step: u64,
    pub(super) step_ms: StepMs,
    pub(super) mfu: f64,
    pub(super) mfu_full_scores: f64,
    pub(super) matmul_frac: f64,
    matmul: Peak,
    pub(super) max_memory_bytes: u64,
    host_ms: f64,
    last_loss: f32,
    /// Absent where CUPTI could not record it, and from reports of earlier versions that had branches beside each other.
    pub(super) busy_frac: Option<f64>,
    fp8_projections: Option<InFp8>,
    pub(super) parts: Vec<PartTime>,
    /// Absent as `power` is.
    activity: Option<StepActivity>,
    /// Absent on the CPU, where it could not be read, and from reports of earlier versions.
    pub(super) power: Option<Power>,
    pub(super) joules_per_token: Option<f64>,
}

/// How many of the blocks' projections are in fp8.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct InFp8 {
    in_fp8: usize,
    of: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StepMs {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
    pub(super) all: Vec<f64>,
}

/// Measures row by row.
pub fn run(args: &Args) -> Result<ExitCode> {
    let device = args.device.device()?;
    let console = Console::new();
    // Before the measurement, which takes a while.
    let beside = args.beside.as_deref().map(Beside::read).transpose()?;
    if let Some(file) = &args.from {
        let report = train_files::read(file)?;
        return finish(args, &report, beside.as_ref());
    }
    let mut report = Report { definition: DEFINITION.to_owned(), device: String::new(), peak: None, rows: Vec::new() };
    let sets = args.overrides();
    for (model, policy, file) in files(args) {
        let config = config_args::load(&file, &sets)?;
        console.line(format!("{model} {policy}: {} steps", args.steps));
        let speed = time_steps(&config, device, Timing { steps: args.steps, details: true })?;
        let peak = peak(&speed, config.train.dtype, device);
        report.device.clone_from(&speed.device);
        if let Some(Err(message)) = &speed.power {
            console.line(format!("{model} {policy}: the GPU's power cannot be read: {message}"));
        }
        if let Some(Err(message)) = &speed.activity {
            console.line(format!("{model} {policy}: the GPU's kernels cannot be recorded: {message}"));
        }
        let row = Row::new(model, policy, speed, &peak);
        if !args.json {
            if report.rows.is_empty() {
                console::print(&header(&report.device, &peak))?;
            }
            console::print(&row.line())?;
        }
        report.peak = Some(peak);
        report.rows.push(row);
    }
    finish(args, &report, beside.as_ref())
}

impl Args {
    /// The overrides of a configuration, of which a later one counts.
    fn overrides(&self) -> Vec<String> {
        let fast = FAST.iter().filter(|_| self.fast).map(|&set| set.to_owned());
        let branches = self.branches.iter().map(|branches| format!("train.branches=\"{branches}\""));
        fast.chain(self.sets.sets.iter().cloned()).chain(branches).collect()
    }
}

/// Writes and prints what was found.
fn finish(args: &Args, report: &Report, beside: Option<&Beside>) -> Result<ExitCode> {
    if let Some(dir) = &args.out {
        train_files::write(dir, report, beside)?;
    }
    if args.json {
        console::print_json(report)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Names and files of the rows.
fn files(args: &Args) -> Vec<(String, String, PathBuf)> {
    if !args.config.is_empty() {
        let named = |file: &PathBuf| {
            let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            (file.display().to_string(), stem, file.clone())
        };
        return args.config.iter().map(named).collect();
    }
    let pairs = args.size.iter().flat_map(|size| args.policy.iter().map(move |policy| (size, policy)));
    pairs
        .map(|(size, policy)| {
            let file = PathBuf::from(format!("configs/bench/{size}/{policy}.toml"));
            (size.clone(), policy.clone(), file)
        })
        .collect()
}

/// The data sheet's dense bf16 rate where we know it, else what was measured.
pub(super) fn peak(speed: &StepSpeed, dtype: Dtype, device: Device) -> Peak {
    let hopper = ["H100", "H200"].iter().any(|name| speed.device.contains(name));
    match device.is_cuda() && hopper && dtype == Dtype::Bf16 {
        true => Peak { name: "989 TFLOP/s, dense bf16 of the data sheet".to_owned(), flops_per_s: 989e12 },
        false => Peak { name: speed.matmul.name.clone(), flops_per_s: speed.matmul.flops_per_s },
    }
}

impl Row {
    fn new(model: String, policy: String, speed: StepSpeed, peak: &Peak) -> Self {
        let fold = |start: f64, f: fn(f64, f64) -> f64| speed.step_ms.iter().copied().fold(start, f);
        let full = speed.flops_per_step_full_scores as f64 / speed.flops_per_step as f64;
        let mfu = speed.flops_per_s / peak.flops_per_s;
        let [in_fp8, of] = speed.fp8_projections;
        let power = speed.power.and_then(std::result::Result::ok);
        let busy_frac = match &speed.activity {
            Some(activity) => activity.as_ref().ok().map(|activity| activity.busy_frac),
            None => Some(speed.busy_frac),
        };
        Self {
            model,
            policy,
            parameters: speed.parameters,
            tokens_per_step: speed.tokens_per_step,
            tokens_per_s: speed.tokens_per_s,
            recomputed_flops_per_step: speed.recomputed_flops_per_step,
            mfu,
            mfu_full_scores: mfu * full,
            matmul_frac: speed.flops_per_s / speed.matmul.flops_per_s,
            step_ms: StepMs {
                median: speed.median_ms,
                min: fold(f64::INFINITY, f64::min),
                max: fold(0., f64::max),
                all: speed.step_ms,
            },
            matmul: Peak { name: speed.matmul.name, flops_per_s: speed.matmul.flops_per_s },
            max_memory_bytes: speed.max_memory_bytes,
            host_ms: speed.host_ms,
            last_loss: speed.last_loss,
            busy_frac,
            activity: speed.activity.and_then(std::result::Result::ok),
            fp8_projections: (of > 0).then_some(InFp8 { in_fp8, of }),
            parts: speed.parts,
            joules_per_token: power.map(|power| power.watts / speed.tokens_per_s),
            power,
        }
    }

    /// Where the time goes, below the row.
    fn parts_line(&self) -> String {
        let parts: Vec<String> = self.parts.iter().map(|part| format!("{} {:.2}", part.name, part.ms)).collect();
        let busy = self.busy_frac.map_or(String::new(), |frac| format!("; busy {:.1} %", 100. * frac));
        let launches = self.activity.as_ref().map_or(String::new(), |activity| {
            format!(" in {:.0} launches", activity.kernels.iter().map(|kernel| kernel.n_launches).sum::<f64>())
        });
        format!("       ms: {}{busy}{launches}\n", parts.join(", "))
    }

    fn line(&self) -> String {
        format!(
            "{:<6} {:<13} {:>9} {:>12} {:>9.2} {:>8.2} {:>8.2} {:>6.1} {:>6.1} {:>7.1} {:>9} {:>8.2}\n",
            self.model,
            self.policy,
            units::count(self.parameters as f64),
            units::grouped(self.tokens_per_s as u64),
            self.step_ms.median,
            self.step_ms.min,
            self.step_ms.max,
            100. * self.mfu,
            100. * self.mfu_full_scores,
            100. * self.matmul_frac,
            units::bytes(self.max_memory_bytes),
            self.host_ms,
        ) + &self.fp8_line()
            + &self.recompute_line()
            + &self.parts_line()
            + &self.power_line()
    }

    /// What the device draws, below the row.
    fn power_line(&self) -> String {
        let (Some(power), Some(joules)) = (self.power, self.joules_per_token) else { return String::new() };
        format!(
            "       power: {:.0} of {:.0} W, {:.2} mJ a token; clock {:.0} of {:.0} MHz, held back {:.0} % of the time\n",
            power.watts,
            power.limit_watts,
            1e3 * joules,
            power.clock_mhz,
            power.max_clock_mhz,
            100. * power.held_back_frac,
        )
    }

    /// What recomputed blocks compute beside the model's FLOPs, below the row.
    fn recompute_line(&self) -> String {
        match self.recomputed_flops_per_step {
            0 => String::new(),
            flops => format!(
                "       {}FLOP a step recomputed, which MFU does not count\n",
                units::spaced(units::count(flops as f64))
            ),
        }
    }

    /// What of the model is in fp8, below the row.
    fn fp8_line(&self) -> String {
        match self.fp8_projections {
            Some(InFp8 { in_fp8, of }) => {
                format!("       {in_fp8} of {of} projections in fp8; MFU is of the bf16 peak\n")
            }
            None => String::new(),
        }
    }
}

fn header(device: &str, peak: &Peak) -> String {
    format!(
        "{device}; MFU of {}\n{:<6} {:<13} {:>9} {:>12} {:>9} {:>8} {:>8} {:>6} {:>6} {:>7} {:>9} {:>8}\n",
        peak.name,
        "model",
        "policy",
        "params",
        "tokens/s",
        "ms/step",
        "min",
        "max",
        "MFU %",
        "full %",
        "GEMM %",
        "memory",
        "host ms"
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn what_is_set_counts_more_than_fast() {
        let line = ["", "--fast", "--set", "train.grads=\"fp32\"", "--branches", "serial"];
        let overrides = Line::parse_from(line).args.overrides();
        assert_eq!(overrides[..5], FAST);
        assert_eq!(overrides[5..], ["train.grads=\"fp32\"", "train.branches=\"serial\""]);
        for size in ["135m", "350m", "1b"] {
            let file = format!("{}/../../configs/bench/{size}/ae_split.toml", env!("CARGO_MANIFEST_DIR"));
            let config = config_args::load(&PathBuf::from(file), &overrides).unwrap();
            assert_eq!((config.train.grads, config.train.deterministic), (Dtype::Fp32, false), "{size}");
        }
    }
}
