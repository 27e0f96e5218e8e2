//! `flowhn bench decode`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use flowhn_model::StepLaunch;
use flowhn_train::bench::{DecodeSpeed, time_decoding};
use serde::Serialize;

use crate::config_args::{self, SetArgs};
use crate::console::{self, Console};
use crate::device::DeviceArgs;
use crate::units;

const AFTER_HELP: &str = "\
A model from configs/bench with random weights reads a prompt of random tokens at once, then writes token by token, greedily: on a GPU
once from CUDA graphs and once operator by operator.

--json prints one object: `device`, `rows`: a list of {model, policy, parameters, prompt_len, prefill_tokens_per_s, decode: a list of
{batch, launch, tokens_per_s, step_ms, cache_bytes}, cache_bytes_per_token, cache_bytes_per_token_attention}. `launch` is `graph` or
`operators`; `cache_bytes` is what decoding holds after the steps, room for later tokens included, the next what it holds a token after the
prompt, and the last what a model of the same shape keeps whose every token goes to attention.";

/// Arguments of `flowhn bench decode`.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Sizes in configs/bench; may be repeated
    #[arg(long, value_name = "SIZE", default_values = ["135m", "1b"])]
    size: Vec<String>,
    /// Split policies in configs/bench/SIZE; may be repeated
    #[arg(long, value_name = "POLICY", default_values = ["cyclic_split"])]
    policy: Vec<String>,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 8192)]
    prompt: usize,
    /// Sequences side by side; may be a list
    #[arg(long, value_delimiter = ',', default_values_t = [1, 64])]
    batch: Vec<usize>,
    /// Tokens to write at each batch size
    #[arg(long, default_value_t = 64)]
    steps: usize,
    #[command(flatten)]
    sets: SetArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    device: String,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    model: String,
    policy: String,
    #[serde(flatten)]
    speed: DecodeSpeed,
}

/// Measures row by row.
pub fn run(args: &Args) -> Result<ExitCode> {
    let device = args.device.device()?;
    let console = Console::new();
    let mut report = Report { device: String::new(), rows: Vec::new() };
    for (size, policy) in args.size.iter().flat_map(|size| args.policy.iter().map(move |policy| (size, policy))) {
        let file = PathBuf::from(format!("configs/bench/{size}/{policy}.toml"));
        let config = config_args::load(&file, &args.sets.sets)?;
        console.line(format!("{size} {policy}: a prompt of {} tokens, then {}", args.prompt, args.steps));
        let speed = time_decoding(&config, device, args.prompt, &args.batch, args.steps)?;
        if !args.json {
            if report.rows.is_empty() {
                console::print(&format!("{}\n", speed.device))?;
            }
            console::print(&line(size, policy, &speed))?;
        }
        report.device.clone_from(&speed.device);
        report.rows.push(Row { model: size.clone(), policy: policy.clone(), speed });
    }
    if args.json {
        console::print_json(&report)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn line(size: &str, policy: &str, speed: &DecodeSpeed) -> String {
    let per_s = |value: f64| units::grouped(value as u64);
    let rows = speed.decode.iter().map(|row| {
        let launch = match row.launch {
            StepLaunch::Graph => " as CUDA graphs",
            StepLaunch::Operators => "",
        };
        let (tokens, step_ms, held) = (per_s(row.tokens_per_s), row.step_ms, row.cache_bytes as f64 / 1e6);
        format!("batch {}{launch}: {tokens} tokens/s, {step_ms:.3} ms a step, {held:.1} MB of caches", row.batch)
    });
    format!(
        "{size} {policy}: prompt of {}: {} tokens/s; {}; cache {:.0} bytes a token, {:.0} with attention alone\n",
        speed.prompt_len,
        per_s(speed.prefill_tokens_per_s),
        rows.collect::<Vec<_>>().join("; "),
        speed.cache_bytes_per_token,
        speed.cache_bytes_per_token_attention,
    )
}
