//! `flowhn bench kernels`.

mod fp8;
mod mlp;
mod operation;
mod peers;
mod routed;
mod row;
mod steps;
mod table;
mod timer;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use flowhn_torch::{DeviceProperties, MemoryStats};
use serde::Serialize;
use tch::Device;

use crate::console::{self, Console};
use crate::device::DeviceArgs;
use operation::{Call, Direction, Operation, Pass, Products};
use peers::Peers;
use row::{Ceilings, Multiple, Peer, Row, Time};
use timer::{Samples, Timer};

const AFTER_HELP: &str = "\
How it is timed: CUDA events around one call, the L2 cache cleared before it, the host ahead of the GPU; the median of --n calls. Wall
time is that of a call among many in a row. `forward` records what gradients need. `backward` runs on a graph that is recorded once
and kept; the time of starting autograd alone, about one empty kernel, is taken off. An operation that is judged by matrix products
takes turns with them. A floor is the larger of bytes over the rate of a device copy and FLOPs over that of a bf16 product of three
8192s, both measured in the same run.

With --peers ours and the Python programs take turns, twice each. Figures in brackets were measured on one H100 with torch 2.11 on
2026-11-21.

--json prints one object: `device`, `ceilings`, `absent` (programs that did not run, and why), and `rows`: op, shape, pass, median_us,
min_us, max_us, wall_us, n, bytes, flops, floor_us, floor_by, of_floor, and where there are any `products` {products_us, multiple,
target, memory_bytes, memory_target}, `recorded` {peer, us, speedup, target, source} and `peers`, a list of {peer, median_us, min_us,
max_us, wall_us, n, speedup}.";

/// Arguments of `flowhn bench kernels`.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    #[command(flatten)]
    device: DeviceArgs,
    /// Only operations whose name and shape contain this text; may be repeated
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// List the operations and time none
    #[arg(long)]
    list: bool,
    /// Calls that are timed of each
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    n: u32,
    /// Small sizes, to try this command itself; its times mean nothing
    #[arg(long)]
    tiny: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Write the times to this file, too
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Time public programs in turns with ours, with this Python
    #[arg(long, value_name = "PYTHON")]
    peers: Option<PathBuf>,
    /// The script that times them
    #[arg(long, value_name = "FILE", default_value = "benches/peers/kernels.py")]
    peers_script: PathBuf,
}

/// Everything that was found.
#[derive(Debug, Serialize)]
struct Report {
    device: String,
    ceilings: Ceilings,
    absent: BTreeMap<String, String>,
    rows: Vec<Row>,
}

/// Times what was asked for.
pub fn run(args: &Args) -> Result<ExitCode> {
    let operations: Vec<Operation> = table::operations(args.tiny)
        .into_iter()
        .filter(|op| args.filter.is_empty() || args.filter.iter().any(|text| op.name().contains(text.as_str())))
        .collect();
    if operations.is_empty() {
        bail!("no operation has {} in its name; --list shows all", args.filter.join(" or "));
    }
    if args.list {
        let names: Vec<String> = operations.iter().map(Operation::name).collect();
        match args.json {
            true => console::print_json(&names)?,
            false => console::print(&(names.join("\n") + "\n"))?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    let device = args.device.device()?;
    // Nobody wants these shapes on a CPU.
    if !device.is_cuda() && !args.tiny {
        bail!(
            "these shapes are for a GPU, and libtorch finds none or --device names none; --tiny tries the command \
             on a CPU"
        );
    }
    Bench::new(args, device)?.run(&operations)
}

/// A run of the command.
struct Bench<'a> {
    args: &'a Args,
    device: Device,
    timer: Timer,
    ceilings: Ceilings,
    start_us: f64,
    peers: Option<Peers>,
    console: Console,
}

impl<'a> Bench<'a> {
    fn new(args: &'a Args, device: Device) -> Result<Self> {
        let timer = Timer::new(device, args.n as usize)?;
        let rate = |operation: Operation| -> Result<f64> {
            let cost = operation.passes[0].cost;
            let (_, us) = forward(&timer, &(operation.build)(device)?)?;
            Ok(1e6 * cost.bytes.max(cost.flops) / us)
        };
        let (n_copied, side) = if args.tiny { (1 << 16, 128) } else { (1 << 30, 8192) };
        let ceilings = Ceilings {
            copy_bytes_per_s: rate(table::copy(n_copied))?,
            gemm_flops_per_s: rate(table::gemm([side; 3], None))?,
        };
        let start_us = backward(&timer, &Call::only_start(device)?)?.spread().0;
        let peers = args.peers.as_ref().map(|python| Peers::start(python, &args.peers_script, args.n as usize));
        Ok(Self { args, device, timer, ceilings, start_us, peers: peers.transpose()?, console: Console::new() })
    }

    fn run(mut self, operations: &[Operation]) -> Result<ExitCode> {
        let device = match self.device {
            Device::Cuda(device_idx) => DeviceProperties::of(device_idx)?.name.clone(),
            _ => "CPU".to_owned(),
        };
        let mut report = Report { device, ceilings: self.ceilings, absent: BTreeMap::new(), rows: Vec::new() };
        if !self.args.json {
            let Ceilings { copy_bytes_per_s, gemm_flops_per_s } = self.ceilings;
            let (copy, gemm) = (copy_bytes_per_s / 1e12, gemm_flops_per_s / 1e12);
            let text = format!("{}: copy {copy:.2} TB/s, bf16 product {gemm:.0} TFLOP/s\n", report.device);
            console::print(&(text + row::HEADER))?;
        }
        let mut n_failed = 0;
        for operation in operations {
            match self.one(operation, &mut report.absent) {
                Ok(rows) => {
                    if !self.args.json {
                        rows.iter().try_for_each(|row| console::print(&row.line()))?;
                    }
                    report.rows.extend(rows);
                }
                Err(error) => {
                    n_failed += 1;
                    self.console.line(format_args!("{} failed: {error:#}", operation.name()));
                }
            }
        }
        for (peer, why) in &report.absent {
            self.console.line(format_args!("{peer} was not timed: {why}"));
        }
        if let Some(path) = &self.args.csv {
            let lines: String = report.rows.iter().map(Row::csv).collect();
            std::fs::write(path, format!("{}{lines}", row::CSV_HEADER))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        if self.args.json {
            console::print_json(&report)?;
        }
        match n_failed {
            0 => Ok(ExitCode::SUCCESS),
            n => bail!("{n} of {} operations failed", operations.len()),
        }
    }

    /// The rows of one operation, after as many rounds as there are.
    fn one(&mut self, operation: &Operation, absent: &mut BTreeMap<String, String>) -> Result<Vec<Row>> {
        let mut ours: Vec<Samples> = vec![Samples::default(); operation.passes.len()];
        let (mut of_products, mut memory_bytes) = (ours.clone(), None);
        let mut theirs: BTreeMap<(String, String), Samples> = BTreeMap::new();
        let n_rounds = if self.peers.is_some() { 2 } else { 1 };
        for _ in 0..n_rounds {
            // The tensors live for a round only: the peers need the memory.
            let call = (operation.build)(self.device)?;
            for ((samples, of_products), pass) in ours.iter_mut().zip(&mut of_products).zip(&operation.passes) {
                let Some(Products { shapes, .. }) = &pass.products else {
                    samples.extend(self.time(&call, pass)?);
                    continue;
                };
                let [own, products] = self.beside_products(&call, shapes)?;
                samples.extend(own);
                of_products.extend(products);
                memory_bytes = self.memory(&call)?;
            }
            drop(call);
            let Some(peers) = &mut self.peers else { continue };
            if self.device.is_cuda() {
                MemoryStats::empty_cache()?;
            }
            for answer in peers.ask(&operation.name())? {
                match &answer.absent {
                    Some(why) => drop(absent.insert(answer.peer, why.clone())),
                    None => {
                        let samples = answer.samples();
                        theirs.entry((answer.peer, answer.pass)).or_default().extend(samples);
                    }
                }
            }
        }
        let mut rows = Vec::new();
        for ((samples, of_products), pass) in ours.iter().zip(&of_products).zip(&operation.passes) {
            let mut row = Row::new(operation, pass, samples, &self.ceilings);
            if let Some(Products { within: target, memory: memory_target, .. }) = pass.products {
                let products_us = of_products.spread().0;
                let multiple = row.time.median_us / products_us;
                row.products = Some(Multiple { products_us, multiple, target, memory_bytes, memory_target });
            }
            for ((peer, _), samples) in theirs.iter().filter(|((_, direction), _)| direction == row.pass) {
                let time = Time::of(samples);
                row.peers.push(Peer { peer: peer.clone(), time, speedup: time.median_us / row.time.median_us });
            }
            rows.push(row);
        }
        Ok(rows)
    }

    /// Forward and backward in turns with matrix products of those shapes. The products follow one another, as the operation's own do, at
    /// the clock that the power limit then leaves.
    fn beside_products(&self, call: &Call, shapes: &[[i64; 3]]) -> Result<[Samples; 2]> {
        let build = |&shape| (table::gemm(shape, None).build)(self.device);
        let products = shapes.iter().map(build).collect::<flowhn_torch::Result<Vec<_>>>()?;
        let in_a_row = || products.iter().try_for_each(|product| (product.run)(&product.leaves).map(drop));
        Ok(self.timer.in_turns([&|| call.backward(&call.recorded()?), &in_a_row])?)
    }

    /// The most bytes that a forward and backward take beside operands and gradients.
    fn memory(&self, call: &Call) -> Result<Option<u64>> {
        let Device::Cuda(device_idx) = self.device else { return Ok(None) };
        MemoryStats::reset_peak(device_idx)?;
        let before = MemoryStats::of(device_idx)?.allocated_bytes;
        let grads = call.gradients(&call.recorded()?)?;
        let n_bytes: usize = grads.iter().map(|grad| grad.numel() * grad.kind().elt_size_in_bytes()).sum();
        Ok(Some(MemoryStats::of(device_idx)?.allocated_peak_bytes.saturating_sub(before + n_bytes as u64)))
    }

    fn time(&self, call: &Call, pass: &Pass) -> Result<Samples> {
        match pass.direction {
            Direction::Forward => Ok(forward(&self.timer, call)?.0),
            Direction::Backward => Ok(backward(&self.timer, call)?.less(self.start_us)),
            Direction::Both => Ok(self.timer.time(&|| call.backward(&call.recorded()?))?),
        }
    }
}

/// The forward, and its median.
fn forward(timer: &Timer, call: &Call) -> Result<(Samples, f64)> {
    let samples = timer.time(&|| (call.run)(&call.leaves).map(drop))?;
    let median = samples.spread().0;
    Ok((samples, median))
}

fn backward(timer: &Timer, call: &Call) -> Result<Samples> {
    let recorded = call.recorded()?;
    Ok(timer.time(&|| call.backward(&recorded))?)
}
