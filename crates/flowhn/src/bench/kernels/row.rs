//! What is told of one pass of one operation: as text, JSON and CSV.

use std::fmt::Display;

use serde::Serialize;

use super::operation::{Operation, Pass, Recorded};
use super::timer::Samples;

/// Where the figures of [`Recorded`] come from.
pub const SOURCE: &str = "measured on one H100, torch 2.11, 2026-11-21";

/// The rates that floors are computed with, measured in the same run.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ceilings {
    /// Bytes read and written per second by a device copy.
    pub copy_bytes_per_s: f64,
    /// FLOPs per second of a bf16 product of three 8192s.
    pub gemm_flops_per_s: f64,
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub op: &'static str,
    pub shape: String,
    pub pass: &'static str,
    #[serde(flatten)]
    pub time: Time,
    pub bytes: f64,
    pub flops: f64,
    pub floor_us: f64,
    /// `bytes` or `flops`, whichever takes longer.
    pub floor_by: &'static str,
    /// The floor as a share of the median.
    pub of_floor: f64,
    /// The matrix products that the operation contains, and the median as a multiple of their time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub products: Option<Multiple>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recorded: Option<Against>,
    /// Programs that were timed in turns with ours.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<Peer>,
}

/// Times in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Time {
    pub median_us: f64,
    pub min_us: f64,
    pub max_us: f64,
    pub wall_us: f64,
    pub n: usize,
}

/// A time as a multiple of that of matrix products one after the other; on CUDA also the most bytes that were taken beside operands
/// and gradients.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Multiple {
    pub products_us: f64,
    pub multiple: f64,
    pub target: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    pub memory_target: u64,
}

/// Ours against a figure that was measured earlier.
#[derive(Clone, Debug, Serialize)]
pub struct Against {
    pub peer: &'static str,
    pub us: f64,
    pub speedup: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<f64>,
    pub source: &'static str,
}

/// Ours against a program of the same run.
#[derive(Clone, Debug, Serialize)]
pub struct Peer {
    pub peer: String,
    #[serde(flatten)]
    pub time: Time,
    pub speedup: f64,
}

impl Time {
    pub fn of(samples: &Samples) -> Self {
        let (median_us, min_us, max_us) = samples.spread();
        Self { median_us, min_us, max_us, wall_us: samples.wall(), n: samples.device_us.len() }
    }
}

impl Row {
    pub fn new(operation: &Operation, pass: &Pass, samples: &Samples, ceilings: &Ceilings) -> Self {
        let time = Time::of(samples);
        let by_bytes = 1e6 * pass.cost.bytes / ceilings.copy_bytes_per_s;
        let by_flops = 1e6 * pass.cost.flops / ceilings.gemm_flops_per_s;
        let floor_us = by_bytes.max(by_flops);
        let against = |Recorded { peer, us, target }: Recorded| Against {
            peer,
            us,
            speedup: us / time.median_us,
            target,
            source: SOURCE,
        };
        Self {
            op: operation.op,
            shape: operation.shape.clone(),
            pass: pass.direction.name(),
            time,
            bytes: pass.cost.bytes,
            flops: pass.cost.flops,
            floor_us,
            floor_by: if by_bytes >= by_flops { "bytes" } else { "flops" },
            of_floor: floor_us / time.median_us,
            products: None,
            recorded: pass.recorded.map(against),
            peers: Vec::new(),
        }
    }

    /// The line of the text form; see [`HEADER`].
    pub fn line(&self) -> String {
        let name = format!("{} {}", self.op, self.shape);
        let Time { median_us, min_us, max_us, wall_us, .. } = self.time;
        let mut line = format!(
            "{name:<40} {:<8} {median_us:>9.1} {:>19} {wall_us:>9.1} {:>9.1} {:>8.0}",
            self.pass,
            format!("{min_us:.1}-{max_us:.1}"),
            self.floor_us,
            100. * self.of_floor
        );
        if let Some(Against { peer, us, speedup, target, .. }) = &self.recorded {
            line += &format!("  {speedup:.2}x of {peer} ({us:.0})");
            line += &target.map(|target| verdict(*speedup >= target, target)).unwrap_or_default();
        }
        if let Some(Multiple { products_us, multiple, target, memory_bytes, memory_target }) = self.products {
            line += &format!("; {multiple:.3} times its products in a row ({products_us:.0})");
            line += &verdict(multiple <= target, target);
            if let Some(bytes) = memory_bytes {
                let mib = |bytes: u64| format!("{:.2}", bytes as f64 / f64::from(1 << 20));
                line += &format!("; {} MiB beside operands and gradients", mib(bytes));
                line += &verdict(bytes <= memory_target, mib(memory_target));
            }
        }
        for Peer { peer, time, speedup } in &self.peers {
            line += &format!("\n{:<40} {:<8} {:>9.1}", format!("  {peer}, in turns"), "", time.median_us);
            line += &format!(" {:>19}", format!("{:.1}-{:.1}", time.min_us, time.max_us));
            line += &format!(" {:>9.1} {:>17}  ours is {speedup:.2}x as fast", time.wall_us, "");
        }
        line + "\n"
    }

    /// The lines of the CSV form; see [`CSV_HEADER`].
    pub fn csv(&self) -> String {
        let line = |who: &str, time: &Time, floor_us: f64| {
            let Time { median_us, min_us, max_us, wall_us, n } = time;
            let (op, shape, pass) = (self.op, &self.shape, self.pass);
            format!("{op},{shape},{pass},{who},{median_us:.2},{min_us:.2},{max_us:.2},{wall_us:.2},{n},{floor_us:.2}\n")
        };
        let mut text = line("flowhn", &self.time, self.floor_us);
        for peer in &self.peers {
            text += &line(&peer.peer.replace(',', ";"), &peer.time, self.floor_us);
        }
        text
    }
}

fn verdict(reached: bool, target: impl Display) -> String {
    format!(", target {target}{}", if reached { "" } else { " MISSED" })
}

/// The head of the text form.
pub const HEADER: &str =
    "operation                                pass      median us             min-max   wall us  floor us  floor %\n";

/// The head of the CSV form.
pub const CSV_HEADER: &str = "op,shape,pass,program,median_us,min_us,max_us,wall_us,n,floor_us\n";

#[cfg(test)]
mod tests {
    use super::super::table::operations;
    use super::*;

    #[test]
    fn a_row_tells_the_larger_floor_and_whether_targets_are_met() {
        let ceilings = Ceilings { copy_bytes_per_s: 3e12, gemm_flops_per_s: 7.5e14 };
        let all = operations(false);
        let scan = &all[0];
        let row = |us: f64| {
            let samples = Samples { device_us: vec![us; 3], wall_us: vec![us] };
            Row::new(scan, &scan.passes[0], &samples, &ceilings)
        };
        // Four tensors of 8 x 4096 x 1536 values and two of 8 x 4096 x 16.
        let bytes = f64::from(2 * 8 * 4096 * (4 * 1536 + 2 * 16));
        let fast = row(400.);
        assert_eq!((fast.floor_by, fast.bytes), ("bytes", bytes));
        assert!((fast.floor_us - bytes / 3e6).abs() < 1e-9 && fast.line().contains("2.22x of mamba-ssm CUDA (887)"));
        assert!(!fast.line().contains("MISSED") && row(600.).line().contains("target 1.8 MISSED"));
        let head = all.iter().find(|op| op.op == "linear_cross_entropy").expect("it is timed");
        let samples = Samples { device_us: vec![1.], wall_us: vec![1.] };
        let mut head = Row::new(head, &head.passes[0], &samples, &ceilings);
        assert_eq!(head.floor_by, "flops");
        let mut told = |memory_bytes, multiple| {
            let (target, memory_target) = (1.25, 1 << 29);
            head.products = Some(Multiple { products_us: 8., multiple, target, memory_bytes, memory_target });
            head.line()
        };
        let fits = told(Some(1 << 29), 1.25);
        assert!(fits.contains("; 1.250 times its products in a row (8), target 1.25; 512.00 MiB beside"), "{fits}");
        assert!(fits.trim_end().ends_with("operands and gradients, target 512.00"), "{fits}");
        let too_much = told(Some((1 << 29) + (1 << 20)), 1.2501);
        assert_eq!(too_much.matches("MISSED").count(), 2, "{too_much}");
        assert!(!told(None, 1.).contains("MiB"));
    }

    #[test]
    fn csv_lines_have_the_columns_of_the_header() {
        let all = operations(true);
        let ceilings = Ceilings { copy_bytes_per_s: 1., gemm_flops_per_s: 1. };
        let samples = Samples { device_us: vec![1.], wall_us: vec![1.] };
        let mut row = Row::new(&all[0], &all[0].passes[1], &samples, &ceilings);
        row.peers.push(Peer { peer: "a, b".into(), time: row.time, speedup: 1. });
        let columns = |line: &str| line.trim_end().split(',').count();
        assert!(row.csv().lines().all(|line| columns(line) == columns(CSV_HEADER)));
        assert_eq!(row.csv().lines().count(), 2);
    }
}
