//! `cargo xtask bench`.

use std::ffi::OsString;
use std::process::ExitCode;

use crate::fail::{Fail, Result};
use crate::repo::Repo;
use crate::{cargo, forward, setup};

const HELP: &str = "cargo xtask bench kernels\ncargo xtask bench train --size 135m\ncargo xtask bench context --size 1b\n\
                    cargo xtask bench decode --size 135m\ncargo xtask bench paper --size tiny\ncargo xtask bench --cpu [arguments of `cargo bench`]";

/// Runs criterion's benchmarks, or has `flowhn bench` measure on a device.
pub fn command(repo: &Repo, mut args: Vec<OsString>) -> Result<ExitCode> {
    if args.is_empty() {
        return Err(Fail::usage("which benchmarks?").help(HELP));
    }
    let Some(place) = args.iter().position(|arg| arg == "--cpu") else {
        return forward::exec(repo, "bench", args);
    };
    args.remove(place);
    setup::run(repo)?;
    cargo::run(cargo::cargo(repo).args(["bench", "--package", "flowhn-benches"]).args(args))?;
    Ok(ExitCode::SUCCESS)
}
