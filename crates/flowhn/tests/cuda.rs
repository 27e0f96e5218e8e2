//! Every case of the selftest on a GPU.
#![cfg(feature = "cuda")]

use std::process::Command;
use std::thread::available_parallelism;

use flowhn_torch::MemoryStats;

/// Processes at most.
const MAX_JOBS: usize = 12;
/// Memory of the GPU that a process takes, about.
const BYTES_OF_JOB: u64 = 2 << 30;

#[test]
fn every_case_passes_on_the_gpu() {
    let by_memory = MemoryStats::of(0).map_or(1, |stats| stats.free_bytes / BYTES_OF_JOB).max(1);
    let n_jobs = available_parallelism().map_or(1, |n| n.get().min(MAX_JOBS).min(by_memory as usize)).to_string();
    let args = ["selftest", "--device", "cuda", "--jobs", &n_jobs];
    let status = Command::new(env!("CARGO_BIN_EXE_flowhn")).args(args).status();
    assert!(status.expect("flowhn starts").success(), "`flowhn selftest --device cuda` failed");
}
