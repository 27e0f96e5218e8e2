//! `cargo xtask dist`: a folder that runs on a machine with PyTorch and without Rust.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::cargo::{cargo, run, stderr_as_stdout};
use crate::fail::{Fail, Result};
use crate::libtorch::VERSION;
use crate::repo::Repo;
use crate::setup;

const LAUNCHER: &str = include_str!("../dist/flowhn.sh");
const README: &str = include_str!("../dist/README.md");

/// The programs, and where they go: the one that needs libtorch behind the launcher, the other beside it.
const PROGRAMS: [(&str, &str); 2] = [("flowhn", "bin/flowhn"), ("flowhn-replay", "flowhn-replay")];

/// What is copied as it is: from the repository, to the bundle.
const COPIED: [(&str, &str); 8] = [
    ("configs", "configs"),
    ("data/tiny", "data/tiny"),
    ("data/eval", "data/eval"),
    ("crates/flowhn-model/tests/golden", "golden"),
    ("benches/peers", "benches/peers"),
    ("LICENSE-MIT", "LICENSE-MIT"),
    ("LICENSE-APACHE", "LICENSE-APACHE"),
    ("LICENSE-DATA", "LICENSE-DATA"),
];

/// Most that the packed bundle may weigh.
const MAX_BYTES: u64 = 40 << 20;

/// Builds the program and packs it with everything it reads.
pub fn command(repo: &Repo, args: Vec<OsString>) -> Result<ExitCode> {
    let out = out_dir(repo, &args)?;
    setup::run(repo)?;
    let mut build = cargo(repo);
    build.args(["build", "--release"]).args(PROGRAMS.iter().flat_map(|(name, _)| ["--package", name]));
    run(build.stdout(stderr_as_stdout()?))?;

    let name = format!("flowhn-{}-linux-x86_64", env!("CARGO_PKG_VERSION"));
    let bundle = out.join(&name);
    let cuda = repo.libtorch_link().join("lib/libtorch_cuda.so").exists();
    fill(repo, &bundle, cuda)?;
    let archive = out.join(format!("{name}.tar.gz"));
    run(Command::new("tar").arg("-czf").arg(&archive).arg("-C").arg(&out).arg(&name))?;

    let n_bytes = fs::metadata(&archive).map_err(|error| cannot("read", &archive, &error))?.len();
    if n_bytes > MAX_BYTES {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        return Err(Fail::new(format!(
            "{} takes {:.1} MiB, more than {:.0}",
            archive.display(),
            mib(n_bytes),
            mib(MAX_BYTES)
        )));
    }
    eprintln!("{} ({:.1} MB)", archive.display(), n_bytes as f64 / 1e6);
    println!("{}", bundle.display());
    Ok(ExitCode::SUCCESS)
}

fn out_dir(repo: &Repo, args: &[OsString]) -> Result<PathBuf> {
    let usage = || Fail::usage("cannot read the arguments").help("cargo xtask dist [--out DIR]");
    match args {
        [] => Ok(repo.path("dist")),
        [flag, dir] if flag == "--out" => std::path::absolute(dir).map_err(|error| Fail::io("read --out", &error)),
        [arg] => match arg.to_str().and_then(|arg| arg.strip_prefix("--out=")) {
            Some(dir) if !dir.is_empty() => std::path::absolute(dir).map_err(|error| Fail::io("read --out", &error)),
            _ => Err(usage()),
        },
        _ => Err(usage()),
    }
}

/// Fills the folder anew.
fn fill(repo: &Repo, bundle: &Path, cuda: bool) -> Result<()> {
    if bundle.exists() {
        // Runs that were made in it are the user's; everything else is ours.
        for entry in list(bundle)? {
            if entry.file_name() != Some(OsStr::new("runs")) {
                let removed = if entry.is_dir() { fs::remove_dir_all(&entry) } else { fs::remove_file(&entry) };
                removed.map_err(|error| cannot("remove", &entry, &error))?;
            }
        }
    }
    let bin = bundle.join("bin");
    fs::create_dir_all(&bin).map_err(|error| cannot("make", &bin, &error))?;
    for (name, to) in PROGRAMS {
        let program = repo.target().join("release").join(name);
        run(Command::new("strip").arg("--strip-all").arg("-o").arg(bundle.join(to)).arg(program))?;
    }
    for (from, to) in COPIED {
        copy(&repo.path(from), &bundle.join(to))?;
    }
    write(&bundle.join("README.md"), &filled_in(README, cuda), 0o644)?;
    write(&bundle.join("flowhn"), &filled_in(LAUNCHER, cuda), 0o755)
}

/// A template with the versions in it. Its lines that begin with `@CUDA@` are for a build that links CUDA.
fn filled_in(template: &str, cuda: bool) -> String {
    let lines = template.lines().filter(|line| cuda || !line.starts_with("@CUDA@"));
    let text: String = lines.flat_map(|line| [line.strip_prefix("@CUDA@").unwrap_or(line), "\n"]).collect();
    text.replace("@VERSION@", VERSION).replace("@FLOWHN@", env!("CARGO_PKG_VERSION"))
}

/// Copies a file, or a folder with all that is in it.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if !from.is_dir() {
        return fs::copy(from, to).map(drop).map_err(|error| cannot("copy", from, &error));
    }
    fs::create_dir_all(to).map_err(|error| cannot("make", to, &error))?;
    for entry in list(from)? {
        copy(&entry, &to.join(entry.file_name().unwrap_or_default()))?;
    }
    Ok(())
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect());
    entries.map_err(|error| cannot("list", dir, &error))
}

fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    fs::write(path, text).map_err(|error| cannot("write", path, &error))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|error| cannot("write", path, &error))
}

fn cannot(doing: &str, path: &Path, error: &std::io::Error) -> Fail {
    Fail::io(format_args!("{doing} {}", path.display()), error)
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::*;

    /// A program being written must not be inherited by a process that another test starts just then: nobody could run it.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

    /// A bundle whose program prints where it runs, what it was told, and its libraries.
    struct Bundle(tempfile::TempDir, #[expect(dead_code, reason = "held")] MutexGuard<'static, ()>);

    impl Bundle {
        fn new(cuda: bool) -> Self {
            let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
            let bundle = Self(tempfile::tempdir().expect("a scratch directory"), turn);
            fs::create_dir_all(bundle.path("bin")).expect("a scratch directory");
            write(&bundle.path("flowhn"), &filled_in(LAUNCHER, cuda), 0o755).expect("a scratch file");
            let program = "#!/bin/sh\npwd -P\necho \"$LD_LIBRARY_PATH\"\nprintf '<%s>' \"$@\"\n";
            write(&bundle.path("bin/flowhn"), program, 0o755).expect("a scratch file");
            bundle
        }

        fn path(&self, inside: &str) -> PathBuf {
            self.0.path().join(inside)
        }

        /// Makes a folder that passes for PyTorch.
        fn torch(&self, name: &str, version: &str, libraries: &[&str]) -> PathBuf {
            let torch = self.path(name);
            fs::create_dir_all(torch.join("lib")).expect("a scratch directory");
            write(&torch.join("version.py"), &format!("__version__ = '{version}'\n"), 0o644).expect("a scratch file");
            for library in libraries {
                write(&torch.join("lib").join(library), "", 0o644).expect("a scratch file");
            }
            torch
        }

        /// Makes a Python that says where torch is.
        fn python(&self, says: &str) -> PathBuf {
            let python = self.path("some-python");
            write(&python, &format!("#!/bin/sh\n{says}\n"), 0o755).expect("a scratch file");
            python
        }

        /// Starts it through a link, from another folder.
        fn start(&self, name: &str, value: &Path) -> (bool, String, String) {
            let link = self.path("link");
            if !link.exists() {
                std::os::unix::fs::symlink("flowhn", &link).expect("a scratch link");
            }
            let mut command = Command::new(link);
            command.args(["train", "a b"]).current_dir("/").env_remove("LIBTORCH").env_remove("FLOWHN_PYTHON");
            let output = command.env("LD_LIBRARY_PATH", "/old").env(name, value).output().expect("sh starts");
            let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
            (output.status.success(), text(output.stdout), text(output.stderr))
        }
    }

    const BOTH: [&str; 2] = ["libtorch_cpu.so", "libtorch_cuda.so"];

    #[test]
    fn the_launcher_finds_torch_and_starts_in_its_own_folder() {
        let bundle = Bundle::new(true);
        let torch = bundle.torch("torch", "2.11.0+cu130", &BOTH);
        let root = bundle.0.path().canonicalize().expect("it is there");
        let want = format!("{}\n{}/lib:/old\n<train><a b>", root.display(), torch.display());
        let python = bundle.python(&format!("echo {}", torch.display()));
        assert_eq!(bundle.start("LIBTORCH", &torch), (true, want.clone(), String::new()));
        assert_eq!(bundle.start("FLOWHN_PYTHON", &python), (true, want, String::new()));
    }

    #[test]
    fn the_launcher_says_what_is_missing() {
        let bundle = Bundle::new(true);
        let refused = |name: &str, value: &Path, words: &[&str]| {
            let (success, stdout, stderr) = bundle.start(name, value);
            assert!(!success && stdout.is_empty(), "{stdout}");
            assert!(stderr.contains("error: ") && stderr.contains("\n  help: "), "{stderr}");
            assert!(words.iter().all(|word| stderr.contains(word)), "{words:?}: {stderr}");
        };
        refused("FLOWHN_PYTHON", Path::new("/no/python"), &["there is no /no/python"]);
        refused("FLOWHN_PYTHON", &bundle.python("echo broken >&2; exit 3"), &["does not run", "broken"]);
        refused("FLOWHN_PYTHON", &bundle.python("echo"), &["has no PyTorch", "pip install torch==2.11.0"]);
        refused("LIBTORCH", &bundle.path("nothing"), &["there is no PyTorch in", "nothing"]);
        let old = bundle.torch("old", "2.10.1+cu128", &BOTH);
        refused("LIBTORCH", &old, &["PyTorch 2.10.1+cu128 is in", "needs 2.11.0"]);
        let cpu = bundle.torch("cpu", "2.11.0+cpu", &BOTH[..1]);
        refused("LIBTORCH", &cpu, &["for the CPU only", "cu130"]);
        let empty = bundle.torch("empty", "2.11.0", &[]);
        refused("LIBTORCH", &empty, &["no libtorch_cpu.so"]);
    }

    #[test]
    fn a_build_without_cuda_runs_on_any_torch() {
        let bundle = Bundle::new(false);
        let cpu = bundle.torch("cpu", "2.11.0+cpu", &BOTH[..1]);
        let (success, _, stderr) = bundle.start("LIBTORCH", &cpu);
        assert!(success, "{stderr}");
    }

    #[test]
    fn templates_are_filled_in() {
        for template in [LAUNCHER, README] {
            for cuda in [true, false] {
                let text = filled_in(template, cuda);
                assert!(["@VERSION", "@CUDA", "@FLOWHN"].iter().all(|hole| !text.contains(hole)), "{text}");
                assert!(text.contains("2.11.0"), "{text}");
            }
        }
    }

    #[test]
    fn the_folder_is_chosen_by_one_argument() {
        let repo = Repo::at("/nowhere");
        let out = |line: &str| {
            let args: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            out_dir(&repo, &args)
        };
        assert_eq!(out(""), Ok("/nowhere/dist".into()));
        assert_eq!(out("--out /a"), Ok("/a".into()));
        assert_eq!(out("--out=/b"), Ok("/b".into()));
        assert!(["--out", "--out=", "/a", "--out /a /b"].into_iter().all(|line| out(line).is_err()));
    }
}
