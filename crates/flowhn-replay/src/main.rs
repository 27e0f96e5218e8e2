#![doc = include_str!("../README.md")]
#![deny(missing_docs)]

mod choice;
mod driver;
mod replay;
mod share;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use flowhn_trace::{Record, Trace};

use choice::{Choice, Found, Kernel, name};
use driver::Device;
use replay::{Mode, Replayer, Spent};
use share::Share;

/// Launches recorded kernels again, without libtorch, each tensor in an allocation of exactly its size
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// Folders that FLOWHN_KERNEL_TRACE named
    #[arg(required = true, value_name = "TRACE")]
    traces: Vec<PathBuf>,
    #[command(flatten)]
    choice: Choice,
    #[command(flatten)]
    share: Share,
    /// The number of the CUDA device
    #[arg(long, value_name = "N", default_value_t = 0)]
    device: usize,
    /// Launch nothing more after this many seconds, and fail if launches are left
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Copy nothing into memory that nobody had written, for initcheck
    #[arg(long)]
    leave_unwritten: bool,
    /// Launch everything twice on the same bytes; other bits afterwards are a failure
    #[arg(long)]
    compare: bool,
    /// Name every launch before it takes place; with --list, the macros and grids of which no launch was recorded
    #[arg(long)]
    verbose: bool,
    /// Count the launches of each kernel that are chosen, and launch none; needs no GPU
    #[arg(long)]
    list: bool,
}

/// What came of the launches.
#[derive(Default)]
struct Tally<'a> {
    n_failed: usize,
    /// How many of each kernel there was no time for.
    left: BTreeMap<&'a str, usize>,
    /// How many of each kernel were replayed, and how long that took.
    done: BTreeMap<&'a str, (usize, Duration)>,
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
    let until = cli.seconds.map(|n| Instant::now() + Duration::from_secs(n));
    let mut traces = Vec::new();
    let mut records = Vec::new();
    for dir in &cli.traces {
        let cannot = || format!("cannot read the trace in {}", dir.display());
        let trace = Trace::open(dir).with_context(cannot)?;
        records.push(trace.records().with_context(cannot)?);
        traces.push(trace);
    }
    let records: Vec<&[Record]> = records.iter().map(Vec::as_slice).collect();
    let kernels = cli.choice.kernels(&records);
    if cli.list {
        list(&kernels, cli.verbose);
        return Ok(ExitCode::SUCCESS);
    }
    let n_skipped: usize = kernels.values().map(|kernel| kernel.n_skipped).sum();
    let chosen = cli.choice.of(records);
    if chosen.is_empty() {
        bail!("no launch was recorded that the arguments choose");
    }

    let device = Device::open(cli.device)?;
    let mode = Mode { leave_unwritten: cli.leave_unwritten, compare: cli.compare };
    let mut replayer = Replayer::new(&device, mode);
    let Tally { n_failed, left, done } = replay_all(cli, until, &device, &mut replayer, &traces, &chosen)?;
    let n_left: usize = left.values().sum();
    let (n_done, n_kernels) = (done.values().map(|(n, _)| n).sum::<usize>(), done.len());
    println!(
        "{n_done} launches of {n_kernels} kernels replayed, {n_failed} failed, {n_left} left for lack of time; {n_skipped} were not recorded"
    );
    let Spent { code, memory, kernels } = replayer.spent();
    println!(
        "seconds: {:.1} loading code, {:.1} memory, {:.1} kernels",
        code.as_secs_f64(),
        memory.as_secs_f64(),
        kernels.as_secs_f64()
    );
    let mut longest: Vec<_> = done.iter().collect();
    longest.sort_by_key(|(_, (_, took))| std::cmp::Reverse(*took));
    for (kernel, (n, took)) in longest.iter().take(3) {
        println!("{:>7.1} s for {n} launches of {kernel}", took.as_secs_f64());
    }
    for (kernel, n) in &left {
        println!("    left: {n} launches of {kernel}");
    }
    Ok(if n_failed + n_left == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn list(kernels: &BTreeMap<&str, Kernel>, verbose: bool) {
    for (name, Kernel { n_launches, n_skipped, missing }) in kernels {
        println!("{n_launches:>7} launches, {n_skipped:>7} not recorded  {name}");
        for (variant, grid, reason) in missing.iter().filter(|_| verbose) {
            println!("        no launch of {grid:?} blocks, {variant}: {reason}");
        }
    }
}

fn replay_all<'a>(
    cli: &Cli,
    until: Option<Instant>,
    device: &Device,
    replayer: &mut Replayer<'a>,
    traces: &[Trace],
    chosen: &[Found<'a>],
) -> Result<Tally<'a>> {
    let own = cli.share.part(chosen.len());
    let mut tally = Tally::default();
    for idx in cli.share.order(chosen.len()) {
        let is_late = until.is_some_and(|until| Instant::now() > until);
        if is_late && !own.contains(&idx) {
            break;
        }
        if !cli.share.claim(idx)? {
            continue;
        }
        let Found { trace, line, launch } = chosen[idx];
        if is_late {
            *tally.left.entry(&launch.kernel).or_default() += 1;
            continue;
        }
        let place = || format!("{}:{line} {} {:?}", cli.traces[trace].display(), name(launch), launch.grid);
        if cli.verbose {
            println!("{}", place());
        }
        let began = Instant::now();
        let outcome = replayer.run(&traces[trace], launch);
        let (n, took) = tally.done.entry(&launch.kernel).or_default();
        *n += 1;
        *took += began.elapsed();
        let Err(error) = outcome else { continue };
        tally.n_failed += 1;
        println!("FAIL {}: {error:#}", place());
        if let Err(error) = device.synchronize() {
            let n_done: usize = tally.done.values().map(|(n, _)| n).sum();
            bail!("the device is lost after {n_done} launches, and the others were not replayed: {error}");
        }
    }
    Ok(tally)
}
