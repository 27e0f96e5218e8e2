//! `cargo xtask bench`.

use std::ffi::OsString;
use std::process::ExitCode;

use crate::fail::{Fail, Result};
use crate::repo::Repo;
use crate::{cargo, forward, setup};

const HELP: &str = "cargo xtask bench kernels --device cuda\ncargo xtask bench train --device cuda\n\
                    cargo xtask bench paper --size tiny\ncargo xtask bench --cpu [arguments of `cargo bench`]";

/// What `flowhn bench` measures.
const MEASURED: [&str; 3] = ["kernels", "train", "paper"];

/// Runs criterion's benchmarks, or has `flowhn bench` measure on a device.
pub fn command(repo: &Repo, mut args: Vec<OsString>) -> Result<ExitCode> {
    if args.first().is_some_and(|arg| MEASURED.iter().any(|name| arg == name)) {
        return forward::exec(repo, "bench", args);
    }
    let Some(place) = args.iter().position(|arg| arg == "--cpu") else {
        return Err(Fail::usage("which benchmarks?").help(HELP));
    };
    args.remove(place);
    setup::run(repo)?;
    cargo::run(cargo::cargo(repo).args(["bench", "--package", "flowhn-benches"]).args(args))?;
    Ok(ExitCode::SUCCESS)
}
