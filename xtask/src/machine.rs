//! What a machine must have before anything is installed or built: a compiler, a Python, room on the disk.

use std::env;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::fail::{Fail, Result};
use crate::libtorch::VERSION;

/// The oldest Python that PyTorch 2.11 has packages for.
const OLDEST_PYTHON: (u32, u32) = (3, 10);

/// Free space an installation needs, in GB: what stays (4.8) and what is downloaded beside it until it is unpacked.
const INSTALL_GB: f64 = 8.0;

/// Asks for another amount, in GB: a package index may have PyTorch for the CPU alone, which takes under 1.
const INSTALL_GB_VAR: &str = "FLOWHN_INSTALL_GB";

/// Prints, one a line: major, minor, whether environments can be made, and where torch is (or an empty line).
const ABOUT_PYTHON: &str = "
import sys
from importlib.util import find_spec
print(sys.version_info[0])
print(sys.version_info[1])
print(all(map(find_spec, ('venv', 'ensurepip'))))
torch = find_spec('torch')
print(list(torch.submodule_search_locations)[0] if torch and torch.submodule_search_locations else '')
";

/// A Python 3 on the search path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Python {
    version: (u32, u32),
    makes_environments: bool,
    torch: Option<PathBuf>,
}

impl Python {
    /// Asks `python3` about itself; it does not load torch for that.
    pub fn ask() -> Result<Self> {
        let answer = Command::new("python3").args(["-c", ABOUT_PYTHON]).stdin(Stdio::null()).output();
        match answer {
            Ok(answer) if answer.status.success() => {
                let text = String::from_utf8_lossy(&answer.stdout);
                Self::parse(&text)
                    .ok_or_else(|| Fail::new(format!("python3 answered {text:?} about itself")).help(PYTHON_HELP))
            }
            Ok(answer) => {
                let why = String::from_utf8_lossy(&answer.stderr);
                let why = why.trim().lines().last().unwrap_or("it says nothing").to_owned();
                Err(Fail::new(format!("python3 does not run: {why}")).help(PYTHON_HELP))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(Fail::new("there is no python3, which installs libtorch").help(PYTHON_HELP))
            }
            Err(error) => Err(Fail::io("start python3", &error).help(PYTHON_HELP)),
        }
    }

    /// Where this Python has a torch package, of whatever version.
    pub fn torch(&self) -> Option<&Path> {
        self.torch.as_deref()
    }

    /// Refuses a Python that cannot install PyTorch into an environment of its own.
    pub fn can_install(&self) -> Result<()> {
        let (major, minor) = self.version;
        if self.version < OLDEST_PYTHON {
            let (old_major, old_minor) = OLDEST_PYTHON;
            let what =
                format!("python3 is Python {major}.{minor}; PyTorch {VERSION} needs {old_major}.{old_minor} or newer");
            return Err(Fail::new(what).help(PYTHON_HELP));
        }
        if !self.makes_environments {
            return Err(Fail::new(format!("this Python {major}.{minor} lacks its modules venv and ensurepip"))
                .help(format!("Debian, Ubuntu: apt install python{major}.{minor}-venv, or python3-venv")));
        }
        Ok(())
    }

    fn parse(answer: &str) -> Option<Self> {
        let mut lines = answer.lines();
        let version = (lines.next()?.parse().ok()?, lines.next()?.parse().ok()?);
        let makes_environments = lines.next()? == "True";
        let torch = lines.next().filter(|line| !line.is_empty()).map(PathBuf::from);
        Some(Self { version, makes_environments, torch })
    }
}

const PYTHON_HELP: &str = "install Python 3.10 or newer with venv (Debian, Ubuntu: apt install python3 python3-venv;\n\
     Fedora: dnf install python3), or set LIBTORCH to an unpacked libtorch 2.11.0";

/// Refuses a machine without a C++ compiler.
pub fn check_compiler() -> Result<()> {
    // The build scripts ask for the same two, in the same order.
    check_compiler_named(env::var_os("CXX").filter(|name| !name.is_empty()))
}

fn check_compiler_named(chosen: Option<OsString>) -> Result<()> {
    let line = chosen.clone().unwrap_or_else(|| "c++".into());
    let line = line.to_string_lossy().into_owned();
    // CXX may carry a wrapper or arguments: `ccache g++`.
    let mut words = line.split_whitespace();
    let program = words.next().unwrap_or("c++");
    let answer = Command::new(program).args(words).arg("--version").stdin(Stdio::null()).output();
    let why = match answer {
        Ok(answer) if answer.status.success() => return Ok(()),
        Ok(answer) => format!("`{line} --version` fails ({})", answer.status),
        Err(error) if error.kind() == ErrorKind::NotFound => format!("`{program}` was not found"),
        Err(error) => format!("`{program}` cannot be started: {error}"),
    };
    let what = match chosen {
        Some(_) => format!("the C++ compiler that CXX names does not run: {why}"),
        None => format!("there is no C++ compiler, which builds the bindings to libtorch: {why}"),
    };
    Err(Fail::new(what).help(
        "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or set CXX to the one you have",
    ))
}

/// Refuses a disk without room for an installation in `dir`.
pub fn check_disk(dir: &Path) -> Result<()> {
    let need = install_gb(env::var_os(INSTALL_GB_VAR))?;
    let free = fs4::available_space(dir)
        .map_err(|error| Fail::io(format_args!("read the free space of {}", dir.display()), &error))?;
    check_room(dir, free as f64 / 1e9, need)
}

/// What an installation needs, in GB, or what the user says that it does.
fn install_gb(chosen: Option<OsString>) -> Result<f64> {
    let Some(chosen) = chosen.filter(|chosen| !chosen.is_empty()) else { return Ok(INSTALL_GB) };
    let chosen = chosen.to_string_lossy();
    chosen.parse().ok().filter(|gb: &f64| gb.is_finite() && *gb >= 0.0).ok_or_else(|| {
        Fail::new(format!("{INSTALL_GB_VAR} is {chosen:?}, which is no number of gigabytes"))
            .help(format!("leave it out (an installation needs {INSTALL_GB:.1}), or set a number like 1.5"))
    })
}

fn check_room(dir: &Path, free: f64, need: f64) -> Result<()> {
    if free >= need {
        return Ok(());
    }
    // Away from each other, so that the two are never told as equal.
    let (free, need) = ((free * 10.0).floor() / 10.0, (need * 10.0).ceil() / 10.0);
    let what = format!("installing PyTorch needs {need:.1} GB free in {}, where {free:.1} GB are", dir.display());
    Err(Fail::new(what).help(format!(
        "make room, or set LIBTORCH to an unpacked libtorch {VERSION} on another disk\n\
         (the CPU build of it takes under 1 GB; {INSTALL_GB_VAR}=1 if your package index has that one)"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_python_is_refused_by_what_it_lacks() {
        let python = Python::parse("3\n11\nTrue\n/opt/site-packages/torch\n").expect("four lines");
        assert_eq!(python.torch(), Some(Path::new("/opt/site-packages/torch")));
        python.can_install().expect("it has all it needs");

        let bare = Python::parse("3\n12\nFalse\n\n").expect("four lines");
        assert_eq!(bare.torch(), None);
        let refusal = bare.can_install().expect_err("no venv").to_string();
        assert!(refusal.contains("ensurepip") && refusal.contains("apt install python3.12-venv"), "{refusal}");

        let old = Python::parse("3\n9\nTrue\n\n").expect("four lines");
        let refusal = old.can_install().expect_err("too old").to_string();
        assert!(refusal.contains("Python 3.9") && refusal.contains("3.10 or newer"), "{refusal}");

        assert_eq!(Python::parse("Hello from a wrapper script\n"), None);
    }

    #[test]
    fn a_full_disk_is_refused_with_both_sizes() {
        let dir = Path::new("/checkout");
        check_room(dir, 8.0, 8.0).expect("just enough");
        let refusal = check_room(dir, 2.399, 8.0).expect_err("too little").to_string();
        assert!(refusal.contains("8.0 GB free in /checkout, where 2.3 GB are"), "{refusal}");
        let refusal = check_room(dir, 1.21, 1.24).expect_err("too little").to_string();
        assert!(refusal.contains("1.3 GB free in /checkout, where 1.2 GB are"), "{refusal}");
        check_disk(Path::new("/nonexistent-directory")).expect_err("no such directory");
    }

    #[test]
    fn the_room_to_ask_for_is_the_users_choice() {
        assert_eq!(install_gb(None).expect("the default"), INSTALL_GB);
        assert_eq!(install_gb(Some("".into())).expect("the default"), INSTALL_GB);
        assert_eq!(install_gb(Some("1.5".into())).expect("a number"), 1.5);
        for wrong in ["plenty", "-1", "NaN", "inf"] {
            let refusal = install_gb(Some(wrong.into())).expect_err("no amount of room").to_string();
            assert!(refusal.contains(INSTALL_GB_VAR) && refusal.contains(wrong), "{refusal}");
        }
    }

    #[test]
    fn the_chosen_compiler_is_the_one_that_is_tried() {
        let refusal = check_compiler_named(Some("no-such-compiler -O2".into())).expect_err("there is none").to_string();
        assert!(refusal.contains("CXX") && refusal.contains("`no-such-compiler` was not found"), "{refusal}");
        let refusal = check_compiler_named(Some("false".into())).expect_err("it fails").to_string();
        assert!(refusal.contains("`false --version` fails"), "{refusal}");
        check_compiler_named(Some("env true".into())).expect("a wrapper and its program run");
    }
}
