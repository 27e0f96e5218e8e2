//! Is this directory the libtorch we build against? Reads files only: no Python is started.

use std::fs;
use std::path::{Path, PathBuf};

/// The version that `tch` binds to; it moves together with the `tch` of the workspace.
pub const VERSION: &str = "2.11.0";

/// Files that a build or a run needs, one of each part of the package: headers, and the libraries we link.
const NEEDED: [&str; 4] =
    ["include/torch/csrc/autograd/function.h", "lib/libc10.so", "lib/libtorch.so", "lib/libtorch_cpu.so"];

/// What a directory holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Package {
    /// A libtorch of the right version, with everything a build needs.
    Fits,
    /// No libtorch at all.
    Absent,
    /// A libtorch of that other version.
    Other(String),
    /// A libtorch without that file.
    Lacks(&'static str),
}

impl Package {
    /// Looks at a directory.
    pub fn at(dir: &Path) -> Self {
        let Some(version) = version_of(dir) else {
            return Self::Absent;
        };
        if release(&version) != VERSION {
            return Self::Other(version);
        }
        match NEEDED.into_iter().find(|file| !dir.join(file).exists()) {
            Some(file) => Self::Lacks(file),
            None => Self::Fits,
        }
    }

    /// What to say of a package that is passed over; nothing of one that is not there.
    pub fn complaint(&self) -> Option<String> {
        match self {
            Self::Fits | Self::Absent => None,
            Self::Other(version) => Some(format!("holds PyTorch {version}, not {VERSION}")),
            Self::Lacks(file) => Some(format!("holds a PyTorch {VERSION} without {file}")),
        }
    }
}

/// The `torch` packages inside a Python environment.
pub fn in_environment(prefix: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for lib in ["lib", "lib64"] {
        let Ok(entries) = fs::read_dir(prefix.join(lib)) else {
            continue;
        };
        let pythons = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"));
        found.extend(pythons.map(|python| python.path().join("site-packages/torch")).filter(|torch| torch.is_dir()));
    }
    // Directories come in no order; the same one must win each time.
    found.sort();
    found
}

/// The version a package states: a plain libtorch has a file of its own for it, a Python package a module.
fn version_of(dir: &Path) -> Option<String> {
    let read = |file: &str| fs::read_to_string(dir.join(file)).ok();
    let plain = || read("build-version").map(|text| text.trim().to_owned());
    let python = || read("version.py").and_then(|text| quoted_after(&text, "__version__"));
    let header = |file: &str| read(file).and_then(|text| quoted_after(&text, "#define TORCH_VERSION "));
    plain()
        .or_else(python)
        .or_else(|| header("include/torch/headeronly/version.h"))
        .or_else(|| header("include/torch/csrc/api/include/torch/version.h"))
        .filter(|version| !version.is_empty())
}

/// The first quoted text after a line that starts with `key`, on that line or, after a backslash, on the next.
fn quoted_after(text: &str, key: &str) -> Option<String> {
    let start = text.match_indices(key).find(|(at, _)| *at == 0 || text[..*at].ends_with('\n'))?.0;
    let mut lines = text[start..].lines();
    let first = lines.next()?.strip_prefix(key)?;
    let line = if first.trim_end().ends_with('\\') { lines.next()? } else { first };
    line.split(['"', '\'']).nth(1).map(str::to_owned)
}

/// The release part of a version: `2.11.0+cu130` is a build of 2.11.0.
fn release(version: &str) -> &str {
    version.split('+').next().unwrap_or(version)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Writes something that passes for a libtorch.
    pub fn fake(dir: &Path, version: &str) {
        for file in NEEDED {
            let file = dir.join(file);
            fs::create_dir_all(file.parent().expect("it is in a directory")).expect("a scratch directory");
            fs::write(file, "").expect("a scratch file");
        }
        fs::write(dir.join("version.py"), format!("__all__ = ['__version__']\n__version__ = '{version}'\n"))
            .expect("a scratch file");
    }

    #[test]
    fn each_kind_of_package_states_its_version() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let cases = [
            ("plain", "build-version", "2.11.0+cpu\n"),
            ("wheel", "version.py", "from typing import Optional\n__version__ = '2.11.0+cu130'\ndebug = False\n"),
            (
                "split",
                "include/torch/headeronly/version.h",
                "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION \\\n  \"2.11.0\"\n",
            ),
            ("older", "include/torch/csrc/api/include/torch/version.h", "#define TORCH_VERSION \"2.9.1\"\n"),
        ];
        let expected = ["2.11.0+cpu", "2.11.0+cu130", "2.11.0", "2.9.1"];
        for ((kind, file, text), expected) in cases.into_iter().zip(expected) {
            let dir = scratch.path().join(kind);
            let file = dir.join(file);
            fs::create_dir_all(file.parent().expect("it is in a directory")).expect("a scratch directory");
            fs::write(file, text).expect("a scratch file");
            assert_eq!(version_of(&dir).as_deref(), Some(expected), "{kind}");
        }
        assert_eq!(version_of(scratch.path()), None);
    }

    #[test]
    fn a_package_fits_only_with_all_its_files_and_the_right_version() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let dir = scratch.path();
        assert_eq!(Package::at(&dir.join("none")), Package::Absent);
        fake(dir, "2.11.0+cu130");
        assert_eq!(Package::at(dir), Package::Fits);
        fs::remove_file(dir.join("lib/libtorch_cpu.so")).expect("it was there");
        assert_eq!(Package::at(dir), Package::Lacks("lib/libtorch_cpu.so"));
        fake(dir, "2.11.1");
        assert_eq!(Package::at(dir), Package::Other("2.11.1".into()));
        assert_eq!(Package::at(dir).complaint().as_deref(), Some("holds PyTorch 2.11.1, not 2.11.0"));
    }

    #[test]
    fn environments_are_searched_in_a_fixed_order() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        for python in ["python3.12", "python3.10", "python2.7"] {
            fake(&scratch.path().join("lib").join(python).join("site-packages/torch"), VERSION);
        }
        let found = in_environment(scratch.path());
        let found: Vec<_> = found.iter().filter_map(|dir| dir.strip_prefix(scratch.path()).ok()).collect();
        let expected = ["lib/python3.10/site-packages/torch", "lib/python3.12/site-packages/torch"];
        assert_eq!(found, expected.map(Path::new));
    }
}
