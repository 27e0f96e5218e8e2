//! Every case of the selftest on a GPU.
#![cfg(feature = "cuda")]

use std::process::Command;

#[test]
fn every_case_passes_on_the_gpu() {
    let status = Command::new(env!("CARGO_BIN_EXE_flowhn")).args(["selftest", "--device", "cuda"]).status();
    assert!(status.expect("flowhn starts").success(), "`flowhn selftest --device cuda` failed");
}
