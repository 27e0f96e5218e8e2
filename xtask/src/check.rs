//! `cargo xtask check`: what CI runs, step by step, each with its name and duration.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use crate::cargo::{cargo, forget_own_package, run, run_unseen, with_libtorch};
use crate::fail::{Fail, Result};
use crate::repo::Repo;
use crate::{commands, hf, outside, setup, tidy};

/// One step of the check.
struct Step {
    name: &'static str,
    run: fn(&Repo) -> Result<()>,
}

/// All steps, those that find most mistakes soonest first.
const STEPS: &[Step] = &[
    Step { name: "tidy", run: tidy::run },
    Step { name: "fmt", run: |repo| run(cargo(repo).args(["fmt", "--all", "--check"])) },
    Step { name: "clippy", run: clippy },
    Step { name: "test", run: |repo| run(cargo(repo).args(["test", "--workspace"])) },
    Step { name: "docs", run: docs },
    Step { name: "configs", run: configs },
    Step { name: "outside", run: outside::check },
    Step { name: "hf", run: hf::check },
];

/// Runs every step, or those that are named, and stops at the first that fails.
pub fn command(repo: &Repo, args: Vec<OsString>) -> Result<ExitCode> {
    let steps = chosen(&args)?;
    setup::run(repo)?;
    let started = Instant::now();
    let mut done = Vec::new();
    for step in steps {
        eprintln!("\n== {} ==", step.name);
        let began = Instant::now();
        let result = (step.run)(repo);
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        let line = format!("{:8} {word:6} {:>8}", step.name, spell(began.elapsed()));
        eprintln!("== {line} ==");
        done.push(line);
        if let Err(fail) = result {
            summary(&done, started);
            return Err(fail);
        }
    }
    summary(&done, started);
    Ok(ExitCode::SUCCESS)
}

fn chosen(args: &[OsString]) -> Result<Vec<&'static Step>> {
    if args.is_empty() {
        return Ok(STEPS.iter().collect());
    }
    let find = |arg: &OsString| {
        STEPS.iter().find(|step| arg == step.name).ok_or_else(|| {
            let names: Vec<_> = STEPS.iter().map(|step| step.name).collect();
            Fail::usage(format!("the check has no step `{}`", arg.to_string_lossy()))
                .help(format!("steps: {}", names.join(", ")))
        })
    };
    args.iter().map(find).collect()
}

fn summary(done: &[String], started: Instant) {
    eprintln!("\ncheck:");
    for line in done {
        eprintln!("  {line}");
    }
    eprintln!("  {:8} {:6} {:>8}", "all", "", spell(started.elapsed()));
}

fn spell(time: Duration) -> String {
    match time.as_secs() {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        secs => format!("{} m {:02} s", secs / 60, secs % 60),
    }
}

fn clippy(repo: &Repo) -> Result<()> {
    run(cargo(repo).args(["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]))
}

fn docs(repo: &Repo) -> Result<()> {
    run(cargo(repo).args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "--deny warnings"))
}

/// Asks the program for each subcommand that we pass on, and has it plan every config that ships: a file that it refuses
/// has no place in the repository.
fn configs(repo: &Repo) -> Result<()> {
    // Just what the step before has built, so that nothing is built again for another choice of features.
    run(cargo(repo).args(["test", "--workspace", "--no-run", "--quiet"]))?;
    let flowhn = |args: &[&str]| {
        let mut flowhn = Command::new(repo.target().join("debug/flowhn"));
        forget_own_package(&mut flowhn);
        with_libtorch(repo, &mut flowhn);
        flowhn.current_dir(repo.root()).args(args);
        flowhn
    };
    for subcommand in commands::of_flowhn() {
        run_unseen(&mut flowhn(&[subcommand, "--help"]))?;
    }
    let mut files = Vec::new();
    toml_files(&repo.path("configs"), &mut files)?;
    if files.is_empty() {
        return Err(Fail::new("configs/ holds no config"));
    }
    for file in &files {
        run_unseen(flowhn(&["plan", "--json", "--config"]).arg(file))?;
    }
    eprintln!("{} configs load and plan", files.len());
    Ok(())
}

fn toml_files(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let cannot = |error: std::io::Error| Fail::io(format_args!("list {}", dir.display()), &error);
    for entry in fs::read_dir(dir).map_err(cannot)? {
        let path = entry.map_err(cannot)?.path();
        if path.is_dir() {
            toml_files(&path, files)?;
        } else if path.extension().is_some_and(|ext| ext == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_chosen_by_name() {
        assert_eq!(chosen(&[]).expect("all of them").len(), STEPS.len());
        let some = chosen(&["tidy".into(), "fmt".into()]).expect("both exist");
        assert_eq!(some.iter().map(|step| step.name).collect::<Vec<_>>(), ["tidy", "fmt"]);
        let refusal = chosen(&["tests".into()]).err().expect("no such step").to_string();
        assert!(refusal.contains("no step `tests`") && refusal.contains("clippy"), "{refusal}");
    }

    #[test]
    fn durations_read_well() {
        assert_eq!(spell(Duration::from_millis(1234)), "1.2 s");
        assert_eq!(spell(Duration::from_secs(125)), "2 m 05 s");
    }
}
