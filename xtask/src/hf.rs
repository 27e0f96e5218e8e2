//! The step of the check that needs Python: checkpoints between `transformers` and us, both ways.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cargo::{cargo, forget_own_package, run, stderr_as_stdout, with_libtorch};
use crate::fail::{Fail, Result};
use crate::libtorch::VERSION;
use crate::repo::Repo;

/// The version that the round trip is tested against. A golden file says itself which one made it.
const TRANSFORMERS: &str = "4.57.6";

/// Builds the program and runs `crates/flowhn/tests/hf/roundtrip.py` with it.
pub fn check(repo: &Repo) -> Result<()> {
    run(cargo(repo).args(["build", "--quiet", "-p", "flowhn"]))?;
    let python = environment(repo)?;
    let mut script = Command::new(python);
    forget_own_package(&mut script);
    with_libtorch(repo, &mut script);
    // Nothing is fetched while testing, and the compiled forms of scripts stay out of the repository.
    script.env("HF_HUB_OFFLINE", "1").env("PYTHONDONTWRITEBYTECODE", "1");
    script.arg(repo.path("crates/flowhn/tests/hf/roundtrip.py")).arg(repo.target().join("debug/flowhn"));
    run(script.current_dir(repo.root()))
}

/// The Python of an environment in the build directory that has transformers, and the PyTorch that `.libtorch` is part of.
fn environment(repo: &Repo) -> Result<PathBuf> {
    let venv = repo.target().join("hf-venv");
    let python = venv.join("bin/python");
    let done = venv.join(format!("transformers-{TRANSFORMERS}"));
    if done.exists() {
        return Ok(python);
    }
    if venv.exists() {
        fs::remove_dir_all(&venv).map_err(|error| Fail::io(format_args!("remove {}", venv.display()), &error))?;
    }
    let torch = fs::canonicalize(repo.libtorch_link())
        .map_err(|error| Fail::io(format_args!("follow {}", repo.libtorch_link().display()), &error))?;
    let packages = torch.parent().filter(|dir| dir.ends_with("site-packages"));
    let quiet = |command: &mut Command| run(command.stdin(Stdio::null()).stdout(stderr_as_stdout()?));
    quiet(Command::new(packages.map_or_else(|| "python3".into(), python_of)).args(["-m", "venv"]).arg(&venv))?;
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]);
    pip.arg(format!("transformers=={TRANSFORMERS}"));
    match packages {
        Some(packages) => borrow_packages(&venv, packages)?,
        // An unpacked libtorch has no Python to borrow.
        None => {
            pip.arg(format!("torch=={VERSION}"));
        }
    }
    quiet(&mut pip)
        .map_err(|fail| fail.help("the step needs a package index: check the network, or name one in PIP_INDEX_URL"))?;
    fs::write(&done, "").map_err(|error| Fail::io(format_args!("write {}", done.display()), &error))?;
    Ok(python)
}

/// The interpreter that a `site-packages` belongs to, or whatever `python3` there is.
fn python_of(packages: &Path) -> PathBuf {
    let own = packages.ancestors().nth(3).map(|prefix| prefix.join("bin/python3")).filter(|python| python.exists());
    own.unwrap_or_else(|| "python3".into())
}

/// Lets the environment import what is in another's `site-packages`, after its own.
fn borrow_packages(venv: &Path, packages: &Path) -> Result<()> {
    let lib = venv.join("lib");
    let own = fs::read_dir(&lib)
        .and_then(|mut entries| entries.next().transpose())
        .map_err(|error| Fail::io(format_args!("list {}", lib.display()), &error))?
        .ok_or_else(|| Fail::new(format!("{} is empty", lib.display())))?;
    let link = own.path().join("site-packages/borrowed.pth");
    fs::write(&link, format!("{}\n", packages.display()))
        .map_err(|error| Fail::io(format_args!("write {}", link.display()), &error))
}
