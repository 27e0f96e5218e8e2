//! `cargo xtask bench`.

use std::ffi::OsString;
use std::process::ExitCode;

use crate::fail::{Fail, Result};
use crate::repo::Repo;
use crate::{cargo, setup};

/// Runs the benchmarks of one kind of device.
pub fn command(repo: &Repo, mut args: Vec<OsString>) -> Result<ExitCode> {
    let Some(place) = args.iter().position(|arg| arg == "--cpu") else {
        return Err(Fail::usage("which benchmarks?").help("cargo xtask bench --cpu [arguments of `cargo bench`]"));
    };
    args.remove(place);
    setup::run(repo)?;
    cargo::run(cargo::cargo(repo).args(["bench", "--package", "flowhn-benches"]).args(args))?;
    Ok(ExitCode::SUCCESS)
}
