//! `cargo xtask setup`: makes `.libtorch` a link to a PyTorch 2.11.0.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::fail::{Fail, Result};
use crate::libtorch::{Package, VERSION, in_environment};
use crate::machine::{self, Python};
use crate::repo::Repo;
use crate::venv;

/// Runs `cargo xtask setup`, which says where libtorch is even when there was nothing to do.
pub fn command(repo: &Repo, args: Vec<OsString>) -> Result<ExitCode> {
    if let Some(arg) = args.first() {
        return Err(Fail::usage(format!("`cargo xtask setup` takes no arguments, got {}", arg.to_string_lossy())));
    }
    run(repo)?;
    let link = repo.libtorch_link();
    let dir = link.canonicalize().map_err(|error| Fail::io("follow .libtorch", &error))?;
    let cuda = if link.join("lib/libtorch_cuda.so").exists() { "with CUDA" } else { "CPU only" };
    eprintln!("libtorch {VERSION} ({cuda}): {}", dir.display());
    Ok(ExitCode::SUCCESS)
}

/// Sets up whatever is missing; returns at once where nothing is.
pub fn run(repo: &Repo) -> Result<()> {
    machine::check_compiler()?;
    let link = repo.libtorch_link();
    let asked_for = asked_for(env::var_os("LIBTORCH"), &link);
    if already_there(asked_for.as_deref(), &link)? {
        return Ok(());
    }
    // Two setups at a time would install into each other. The system drops the lock when its holder dies.
    let _turn = take_turn(repo)?;
    if already_there(asked_for.as_deref(), &link)? {
        return Ok(());
    }
    let dir = match asked_for {
        Some(dir) => dir,
        None => find_or_install(repo)?,
    };
    make_link(repo.root(), &link, &dir)
}

/// The directory that the user chose by LIBTORCH, if any. Cargo sets the variable to our own link for us.
fn asked_for(variable: Option<OsString>, link: &Path) -> Option<PathBuf> {
    let dir = variable.filter(|value| !value.is_empty()).map(PathBuf::from)?;
    let same = |a: &Path, b: &Path| a == b || matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
    (dir != link && !same(&dir, link)).then_some(dir)
}

/// True when the link leads to what is wanted.
///
/// # Errors
/// The user's LIBTORCH is no libtorch of our version: to pass over it would build against something else than asked.
fn already_there(asked_for: Option<&Path>, link: &Path) -> Result<bool> {
    let Some(dir) = asked_for else {
        return Ok(Package::at(link) == Package::Fits);
    };
    if dir.is_relative() {
        return Err(Fail::new(format!("LIBTORCH is the relative path {}", dir.display()))
            .help("cargo builds each crate in a directory of its own: make it an absolute path"));
    }
    match Package::at(dir) {
        // The link leads elsewhere, or `asked_for` would have told them to be the same.
        Package::Fits => Ok(false),
        other => {
            let complaint = other.complaint().unwrap_or_else(|| "holds no libtorch".into());
            Err(Fail::new(format!("LIBTORCH is {}, which {complaint}", dir.display()))
                .help(format!("point it at a libtorch {VERSION}, or unset it: setup then finds or installs one")))
        }
    }
}

fn find_or_install(repo: &Repo) -> Result<PathBuf> {
    if let Some(dir) = venv::finished_torch(&repo.venv()) {
        return Ok(dir);
    }
    let mut passed_over = Vec::new();
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        let Some(prefix) = env::var_os(variable).map(PathBuf::from).filter(|prefix| *prefix != repo.venv()) else {
            continue;
        };
        if let Some(dir) = first_fitting(in_environment(&prefix), &mut passed_over) {
            return Ok(dir);
        }
    }
    let python = Python::ask()?;
    if let Some(dir) = first_fitting(python.torch().map(Path::to_path_buf), &mut passed_over) {
        return Ok(dir);
    }

    python.can_install()?;
    machine::check_disk(repo.root())?;
    passed_over.dedup();
    for note in passed_over {
        eprintln!("Passed over: {note}.");
    }
    eprintln!(
        "Installing PyTorch {VERSION}, which brings libtorch, into {} with pip: about 2.7 GB to download,\n\
         4.8 GB on the disk, a few minutes, once. (To use one you have, stop this and set LIBTORCH to it.)",
        repo.venv().display(),
    );
    // A link into the environment must not outlive what it led to.
    remove_link(&repo.libtorch_link())?;
    let dir = venv::install(&repo.venv())?;
    eprintln!("Installed PyTorch {VERSION}.");
    Ok(dir)
}

fn first_fitting(dirs: impl IntoIterator<Item = PathBuf>, passed_over: &mut Vec<String>) -> Option<PathBuf> {
    dirs.into_iter().find(|dir| {
        let package = Package::at(dir);
        passed_over.extend(package.complaint().map(|complaint| format!("{} {complaint}", dir.display())));
        package == Package::Fits
    })
}

/// Points the link at `dir`, in one step: a build that runs beside us sees the old link or the new one.
fn make_link(root: &Path, link: &Path, dir: &Path) -> Result<()> {
    refuse_directory(link)?;
    // Inside the checkout the link is relative, and stays right when the checkout moves.
    let to = dir.strip_prefix(root).unwrap_or(dir);
    let fresh = root.join(".libtorch.tmp");
    let cannot = |error: std::io::Error| {
        Fail::io(format_args!("make the link {}", link.display()), &error).help("the checkout must be writable")
    };
    remove_link(&fresh)?;
    symlink(to, &fresh).map_err(cannot)?;
    fs::rename(&fresh, link).map_err(cannot)?;
    eprintln!(".libtorch -> {}", to.display());
    Ok(())
}

fn remove_link(link: &Path) -> Result<()> {
    refuse_directory(link)?;
    match fs::remove_file(link) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Fail::io(format_args!("remove {}", link.display()), &error))
        }
        _ => Ok(()),
    }
}

/// A directory at the link's place is somebody's own and is not ours to remove.
fn refuse_directory(link: &Path) -> Result<()> {
    if link.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
        let complaint = Package::at(link).complaint().unwrap_or_else(|| "is no link".into());
        return Err(Fail::new(format!("{} is a directory that {complaint}", link.display()))
            .help("move it away; setup puts a link there"));
    }
    Ok(())
}

fn take_turn(repo: &Repo) -> Result<File> {
    let dir = repo.path(".cache");
    let cannot = |error: std::io::Error| {
        Fail::io(format_args!("write in {}", dir.display()), &error).help("the checkout must be writable")
    };
    fs::create_dir_all(&dir).map_err(cannot)?;
    let file = File::create(dir.join("setup.lock")).map_err(cannot)?;
    if file.try_lock().is_err() {
        eprintln!("Another setup is at work; waiting for it.");
        file.lock().map_err(cannot)?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libtorch::tests::fake;

    #[test]
    fn cargos_own_libtorch_variable_is_nobodys_choice() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let link = scratch.path().join(".libtorch");
        let torch = scratch.path().join("torch");
        let asked = |value: &Path| asked_for(Some(value.into()), &link);
        assert_eq!(asked_for(None, &link), None);
        assert_eq!(asked(Path::new("")), None);
        assert_eq!(asked(&link), None, "cargo sets it to the link");
        assert_eq!(asked(&torch), Some(torch.clone()));

        fake(&torch, VERSION);
        symlink(&torch, &link).expect("a scratch link");
        assert_eq!(asked(&torch), None, "the link leads there already");
    }

    #[test]
    fn a_wrong_libtorch_variable_is_refused_and_not_passed_over() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let link = scratch.path().join(".libtorch");
        let torch = scratch.path().join("torch");
        let refusal = |dir: &Path| already_there(Some(dir), &link).expect_err("it must be refused").to_string();
        assert!(refusal(&torch).contains("holds no libtorch"));
        assert!(refusal(Path::new("../torch")).contains("relative path ../torch"));
        fake(&torch, "2.9.1+cpu");
        assert!(refusal(&torch).contains("holds PyTorch 2.9.1+cpu, not 2.11.0"));
        fake(&torch, "2.11.0+cpu");
        assert_eq!(already_there(Some(&torch), &link), Ok(false), "the link has yet to be made");
    }

    #[test]
    fn the_link_is_replaced_but_a_directory_in_its_place_is_not() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let root = scratch.path();
        let link = root.join(".libtorch");
        symlink("gone", &link).expect("a scratch link");
        let torch = root.join(".venv/lib/python3.11/site-packages/torch");
        fake(&torch, VERSION);
        assert_eq!(already_there(None, &link), Ok(false), "the link leads nowhere");
        make_link(root, &link, &torch).expect("a dangling link is replaced");
        assert_eq!(fs::read_link(&link).expect("a link"), Path::new(".venv/lib/python3.11/site-packages/torch"));
        assert_eq!(already_there(None, &link), Ok(true));

        fs::remove_file(&link).expect("it was there");
        fake(&link, "2.9.1");
        let refusal = make_link(root, &link, &torch).expect_err("it is a directory").to_string();
        assert!(refusal.contains("holds PyTorch 2.9.1"), "{refusal}");
        assert!(link.join("version.py").exists());
    }
}
