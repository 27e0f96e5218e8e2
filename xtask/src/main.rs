//! `cargo xtask`: the repository's chores.
//!
//! It depends on none of our crates, so it builds in seconds and without libtorch, which it is there to set up.
//! The table [`commands::COMMANDS`] is the whole command line; `cargo xtask --help` prints it.

#![forbid(unsafe_code)]

mod bench;
mod cargo;
mod check;
mod commands;
mod dist;
mod fail;
mod forward;
mod hf;
mod libtorch;
mod machine;
mod outside;
mod pip;
mod repo;
mod setup;
mod tidy;
mod venv;

use std::process::ExitCode;

use commands::Command;
use repo::Repo;

/// The exit code of a command line that makes no sense.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let Some(name) = args.next() else {
        eprint!("{}", commands::help());
        return ExitCode::from(USAGE);
    };
    let name = name.to_string_lossy().into_owned();
    if matches!(name.as_str(), "--help" | "-h" | "help") {
        print!("{}", commands::help());
        return ExitCode::SUCCESS;
    }
    let Some(command) = Command::find(&name) else {
        eprintln!("error: there is no `cargo xtask {name}`\n");
        eprint!("{}", commands::help());
        return ExitCode::from(USAGE);
    };
    let args = args.collect();
    match Repo::locate().and_then(|repo| command.run(&repo, args)) {
        Ok(code) => code,
        Err(fail) => {
            eprintln!("{fail}");
            ExitCode::from(fail.code())
        }
    }
}
