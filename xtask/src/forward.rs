//! Subcommands of `flowhn`: set up, build, and let the program take xtask's place.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use crate::fail::{Fail, Result};
use crate::repo::Repo;
use crate::{cargo, setup};

/// What `cargo xtask train` trains when nobody says what.
const DEFAULT_CONFIG: &str = "configs/tiny.toml";

/// Builds `flowhn` in release mode and becomes it, so that its signals, output and exit code are ours.
///
/// Returns only when the program could not be started. What happens before it starts is told on standard error.
pub fn exec(repo: &Repo, subcommand: &str, args: Vec<OsString>) -> Result<ExitCode> {
    setup::run(repo)?;
    let mut build = cargo::cargo(repo);
    build.args(["build", "--release", "--package", "flowhn"]).stdout(cargo::stderr_as_stdout()?);
    cargo::run(&mut build)?;

    let program = repo.target().join("release/flowhn");
    let mut flowhn = Command::new(&program);
    flowhn.current_dir(repo.root()).arg(subcommand).args(with_defaults(subcommand, args));
    cargo::forget_own_package(&mut flowhn);
    cargo::with_libtorch(repo, &mut flowhn);
    Err(Fail::io(format_args!("start {}", program.display()), &flowhn.exec()))
}

/// The arguments, with the tiny config for a `train` that says neither by a config nor by a run what to train.
fn with_defaults(subcommand: &str, mut args: Vec<OsString>) -> Vec<OsString> {
    let has = |flag: &str| {
        args.iter().any(|arg| {
            arg.to_string_lossy().strip_prefix(flag).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
        })
    };
    let has_short = |flag: &str| args.iter().any(|arg| arg.to_string_lossy().starts_with(flag));
    let config = has("--config") || has_short("-c");
    let run = has("--resume") && has("--run-dir");
    let help = has("--help") || has_short("-h");
    if subcommand == "train" && !(config || run || help) {
        args.splice(0..0, ["--config".into(), DEFAULT_CONFIG.into()]);
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults(line: &str) -> String {
        let mut words = line.split_whitespace();
        let subcommand = words.next().expect("a subcommand");
        let args = with_defaults(subcommand, words.map(OsString::from).collect());
        args.join(" ".as_ref()).into_string().expect("the words were text")
    }

    #[test]
    fn train_without_a_config_trains_the_tiny_one() {
        assert_eq!(defaults("train"), "--config configs/tiny.toml");
        assert_eq!(defaults("train --resume"), "--config configs/tiny.toml --resume");
        assert_eq!(defaults("train --run-dir runs/b"), "--config configs/tiny.toml --run-dir runs/b");
        for kept in [
            "--config a.toml",
            "--config=a.toml",
            "-c a.toml --resume",
            "-ca.toml",
            "--run-dir runs/b --resume",
            "--resume --run-dir=runs/b",
            "--help",
        ] {
            assert_eq!(defaults(&format!("train {kept}")), kept);
        }
        assert_eq!(defaults("plan --json"), "--json");
    }
}
