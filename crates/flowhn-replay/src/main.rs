#![doc = include_str!("../README.md")]
#![deny(missing_docs)]

mod choice;
mod driver;
mod replay;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use flowhn_trace::{Launch, Record, Trace};

use choice::{Choice, kernels, name};
use driver::{Device, Module};
use replay::Mode;

/// Launches recorded kernels again, without libtorch, each tensor in an allocation of exactly its size
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// Folders that FLOWHN_KERNEL_TRACE named
    #[arg(required = true, value_name = "TRACE")]
    traces: Vec<PathBuf>,
    #[command(flatten)]
    choice: Choice,
    /// Launch nothing more after this many seconds, and fail if launches are left
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Copy nothing into memory that nobody had written, for initcheck
    #[arg(long)]
    leave_unwritten: bool,
    /// Launch everything twice on the same bytes; other bits afterwards are a failure
    #[arg(long)]
    compare: bool,
    /// Name every launch before it takes place
    #[arg(long)]
    verbose: bool,
    /// Count the launches of each kernel and launch none; needs no GPU
    #[arg(long)]
    list: bool,
}

/// What came of all launches.
#[derive(Default)]
struct Tally {
    n_done: usize,
    n_failed: usize,
    n_left: usize,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let mut traces = Vec::new();
    for dir in &cli.traces {
        let cannot = || format!("cannot read the trace in {}", dir.display());
        let trace = Trace::open(dir).with_context(cannot)?;
        let records = trace.records().with_context(cannot)?;
        traces.push((dir, trace, records));
    }
    let n_skipped: usize =
        traces.iter().flat_map(|(_, _, records)| records).filter(|record| matches!(record, Record::Skipped(_))).count();
    if cli.list {
        for (kernel, [n_launches, n_skipped]) in kernels(traces.iter().flat_map(|(_, _, records)| records)) {
            println!("{n_launches:>7} launches, {n_skipped:>7} not recorded  {kernel}");
        }
        return Ok(ExitCode::SUCCESS);
    }

    let device = Device::open(0)?;
    let until = cli.seconds.map(|n| Instant::now() + Duration::from_secs(n));
    let mut tally = Tally::default();
    let mut done = BTreeMap::new();
    for (dir, trace, records) in &traces {
        let chosen = cli.choice.of(records);
        let mut modules = HashMap::new();
        for (idx, (line, launch)) in chosen.iter().enumerate() {
            if until.is_some_and(|until| Instant::now() > until) {
                tally.n_left += chosen.len() - idx;
                break;
            }
            if cli.verbose {
                println!("{}:{line} {} {:?}", dir.display(), name(launch), launch.grid);
            }
            let outcome = one(cli, &device, trace, &mut modules, launch);
            tally.n_done += 1;
            *done.entry(&launch.kernel).or_insert(0_usize) += 1;
            let Err(error) = outcome else { continue };
            tally.n_failed += 1;
            println!("FAIL {}:{line} {} {:?}: {error:#}", dir.display(), name(launch), launch.grid);
            if let Err(error) = device.synchronize() {
                let n_left = chosen.len() - idx - 1;
                bail!("the device is lost, {n_left} launches of {} were not replayed: {error}", dir.display());
            }
        }
    }
    let Tally { n_done, n_failed, n_left } = tally;
    let n_kernels = done.len();
    println!(
        "{n_done} launches of {n_kernels} kernels replayed, {n_failed} failed, {n_left} left for lack of time; {n_skipped} were not recorded"
    );
    if n_done + n_left == 0 {
        bail!("no launch was recorded that the arguments choose");
    }
    Ok(if n_failed + n_left == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn one<'a>(
    cli: &Cli,
    device: &Device,
    trace: &Trace,
    modules: &mut HashMap<&'a str, Module>,
    launch: &'a Launch,
) -> Result<()> {
    if !modules.contains_key(launch.cubin.as_str()) {
        let code = trace.cubin(&launch.cubin).with_context(|| format!("cannot read {}", launch.cubin))?;
        modules.insert(&launch.cubin, device.load(&code)?);
    }
    let function = modules[launch.cubin.as_str()].function(&launch.entry)?;
    replay::run(device, &function, trace, launch, Mode { leave_unwritten: cli.leave_unwritten, compare: cli.compare })
}
