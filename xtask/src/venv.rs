//! The repository's own Python environment, `.venv`, made only where no fitting PyTorch is to be had.
//!
//! While it is being made it holds a marker, so that a run cut short is told from one that ended, and repaired.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cargo::{run, stderr_as_stdout};
use crate::fail::{Fail, Result};
use crate::libtorch::{Package, VERSION, in_environment};
use crate::pip;

/// Lies in an environment while setup works on it.
const MARKER: &str = "setup-in-progress.tmp";
/// The marker's text in an environment that setup itself made, and may therefore remove.
const MADE: &str = "made by setup";
/// The marker's text in an environment that was there before.
const FOUND: &str = "found by setup";

/// What is at the place of the environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nothing.
    Absent,
    /// An environment with a Python in it.
    Ready,
    /// An environment of our own, cut short.
    HalfMade,
    /// An environment that was there before us, with an installation in it cut short.
    HalfInstalled,
    /// Something that is no environment, or one whose Python is gone.
    Foreign,
}

impl State {
    /// Looks at the place.
    pub fn of(venv: &Path) -> Self {
        match fs::read_to_string(venv.join(MARKER)) {
            Ok(text) if text == FOUND => Self::HalfInstalled,
            Ok(_) => Self::HalfMade,
            Err(_) if python(venv).exists() => Self::Ready,
            // A link that leads nowhere is there too, though it does not "exist".
            Err(_) if venv.symlink_metadata().is_ok() => Self::Foreign,
            Err(_) => Self::Absent,
        }
    }
}

/// The fitting PyTorch of an environment that is complete.
pub fn finished_torch(venv: &Path) -> Option<PathBuf> {
    if State::of(venv) != State::Ready {
        return None;
    }
    in_environment(venv).into_iter().find(|torch| Package::at(torch) == Package::Fits)
}

/// Installs PyTorch into `.venv`, which it makes, completes or repairs, and returns where it is.
pub fn install(venv: &Path) -> Result<PathBuf> {
    let mode = match State::of(venv) {
        State::Foreign => {
            return Err(Fail::new(format!("{} is in the way: it holds no working Python", venv.display()))
                .help("move it away or remove it, and run the same command again"));
        }
        State::HalfMade => {
            eprintln!("An earlier installation was cut short; it starts anew.");
            remove(venv)?;
            make(venv)?;
            pip::Mode::Add
        }
        State::Absent => {
            make(venv)?;
            pip::Mode::Add
        }
        State::HalfInstalled => {
            eprintln!("An earlier installation was cut short; every package is written again.");
            pip::Mode::Rewrite
        }
        State::Ready => {
            mark(venv, FOUND)?;
            pip::Mode::Add
        }
    };
    let scratch = venv.join("tmp");
    fs::create_dir_all(&scratch).map_err(|error| Fail::io(format_args!("make {}", scratch.display()), &error))?;
    let installed = pip::install_torch(&python(venv), &scratch, mode);
    remove(&scratch)?;
    installed?;
    let torch =
        in_environment(venv).into_iter().find(|torch| Package::at(torch) == Package::Fits).ok_or_else(|| {
            Fail::new(format!("pip ended well, but {} holds no complete PyTorch {VERSION}", venv.display()))
                .help("remove that directory and run the same command again")
        })?;
    let marker = venv.join(MARKER);
    fs::remove_file(&marker).map_err(|error| Fail::io(format_args!("remove {}", marker.display()), &error))?;
    Ok(torch)
}

fn make(venv: &Path) -> Result<()> {
    fs::create_dir_all(venv).map_err(|error| {
        Fail::io(format_args!("make {}", venv.display()), &error).help("the checkout must be writable")
    })?;
    mark(venv, MADE)?;
    run(Command::new("python3").args(["-m", "venv"]).arg(venv).stdin(Stdio::null()).stdout(stderr_as_stdout()?))
        .map_err(|fail| fail.help("Debian, Ubuntu: apt install python3-venv"))
}

fn mark(venv: &Path, text: &str) -> Result<()> {
    let marker = venv.join(MARKER);
    fs::write(&marker, text).map_err(|error| Fail::io(format_args!("write {}", marker.display()), &error))
}

fn remove(dir: &Path) -> Result<()> {
    fs::remove_dir_all(dir).map_err(|error| Fail::io(format_args!("remove {}", dir.display()), &error))
}

fn python(venv: &Path) -> PathBuf {
    venv.join("bin/python")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libtorch::tests::fake;

    #[test]
    fn what_is_there_decides_what_may_be_done_to_it() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let venv = scratch.path().join(".venv");
        assert_eq!(State::of(&venv), State::Absent);

        fs::create_dir_all(venv.join("bin")).expect("a scratch directory");
        assert_eq!(State::of(&venv), State::Foreign, "a directory without a Python");
        mark(&venv, MADE).expect("a scratch file");
        assert_eq!(State::of(&venv), State::HalfMade);

        fs::write(python(&venv), "").expect("a scratch file");
        mark(&venv, FOUND).expect("a scratch file");
        assert_eq!(State::of(&venv), State::HalfInstalled);
        fake(&venv.join("lib/python3.11/site-packages/torch"), VERSION);
        assert_eq!(finished_torch(&venv), None, "a marked environment may be half of one");

        fs::remove_file(venv.join(MARKER)).expect("it was there");
        assert_eq!(State::of(&venv), State::Ready);
        assert_eq!(finished_torch(&venv), Some(venv.join("lib/python3.11/site-packages/torch")));
    }

    #[test]
    fn a_stranger_in_the_way_is_left_alone() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let venv = scratch.path().join(".venv");
        fs::create_dir(&venv).expect("a scratch directory");
        fs::write(venv.join("notes.txt"), "mine").expect("a scratch file");
        let refusal = install(&venv).expect_err("it is no environment").to_string();
        assert!(refusal.contains("in the way") && refusal.contains("move it away"), "{refusal}");
        assert!(venv.join("notes.txt").exists());
    }
}
