//! Calls of cargo, with libtorch where cargo and the programs it starts will look for it.

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd as _;
use std::process::{Command, ExitCode, Stdio};

use crate::fail::{Fail, Result};
use crate::repo::Repo;
use crate::setup;

/// Runs `cargo test`: unit tests, integration tests and the examples in the documentation.
pub fn test(repo: &Repo, args: Vec<OsString>) -> Result<ExitCode> {
    setup::run(repo)?;
    let mut cargo = cargo(repo);
    cargo.arg("test");
    if !names_packages(&args) {
        cargo.arg("--workspace");
    }
    run(cargo.args(args))?;
    Ok(ExitCode::SUCCESS)
}

/// The cargo that called us, in the repository's root.
pub fn cargo(repo: &Repo) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(repo.root());
    forget_own_package(&mut command);
    with_libtorch(repo, &mut command);
    command
}

/// Lets a program find libtorch.
///
/// Test binaries have a run path relative to themselves, but rustdoc builds the examples elsewhere and a build
/// directory of the user's own breaks it as well; the search path serves all of them.
pub fn with_libtorch(repo: &Repo, command: &mut Command) {
    let lib = repo.libtorch_link().join("lib");
    let old = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let paths = std::iter::once(lib).chain(env::split_paths(&old).filter(|path| !path.as_os_str().is_empty()));
    // A path with a colon in it cannot stand in the list; the run path has to do then.
    if let Ok(joined) = env::join_paths(paths) {
        command.env("LD_LIBRARY_PATH", joined);
    }
}

/// Removes what `cargo run` told us about our own package: to the programs below, it would be about themselves.
pub fn forget_own_package(command: &mut Command) {
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") || text == "CARGO_CRATE_NAME" {
            command.env_remove(name);
        }
    }
}

/// Runs a command to its end, its output going where ours goes.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().map_err(|error| cannot_start(command, &error))?;
    if status.success() {
        return Ok(());
    }
    Err(Fail::new(format!("`{}` failed ({status})", show(command))))
}

/// Runs a command to its end; what it says is shown only if it fails.
pub fn run_unseen(command: &mut Command) -> Result<()> {
    let output = command.output().map_err(|error| cannot_start(command, &error))?;
    if output.status.success() {
        return Ok(());
    }
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    Err(Fail::new(format!("`{}` failed ({})", show(command), output.status)))
}

/// Runs a command to its end and returns its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().map_err(|error| cannot_start(command, &error))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Fail::new(format!("`{}` failed ({})", show(command), output.status)))
}

/// Our standard error as the standard output of a child: ours stays free for what a command returns.
pub fn stderr_as_stdout() -> Result<Stdio> {
    let stderr = std::io::stderr().as_fd().try_clone_to_owned();
    stderr.map(Stdio::from).map_err(|error| Fail::io("use standard error", &error))
}

/// A command as one would type it.
pub fn show(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words: Vec<_> = std::iter::once(program).chain(command.get_args()).map(OsStr::to_string_lossy).collect();
    words.join(" ")
}

fn cannot_start(command: &Command, error: &std::io::Error) -> Fail {
    Fail::io(format_args!("start `{}`", command.get_program().to_string_lossy()), error)
}

/// True when arguments of `cargo test` already say which packages they mean.
fn names_packages(args: &[OsString]) -> bool {
    args.iter().map(|arg| arg.to_string_lossy()).take_while(|arg| arg != "--").any(|arg| {
        let long = ["--package", "--workspace", "--all", "--manifest-path"];
        let long =
            long.iter().any(|flag| arg.strip_prefix(flag).is_some_and(|rest| rest.is_empty() || rest.starts_with('=')));
        long || arg.starts_with("-p")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn the_whole_workspace_is_tested_unless_packages_are_named() {
        for named in
            ["-p flowhn-ssm", "-pflowhn-ssm", "--package=flowhn-ssm", "--workspace --lib", "some_test --package x"]
        {
            assert!(names_packages(&words(named)), "{named}");
        }
        for all in ["", "some_test", "--lib", "some_test -- -p", "--all-targets", "--profile release"] {
            assert!(!names_packages(&words(all)), "{all}");
        }
    }

    #[test]
    fn libtorch_comes_first_in_the_search_path() {
        let repo = Repo::at("/nowhere");
        let mut command = Command::new("true");
        with_libtorch(&repo, &mut command);
        let (_, value) = command.get_envs().find(|(name, _)| *name == "LD_LIBRARY_PATH").expect("it is set");
        let first = env::split_paths(value.expect("it has a value")).next();
        assert_eq!(first, Some("/nowhere/.libtorch/lib".into()));
    }
}
