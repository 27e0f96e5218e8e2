//! `cargo xtask setup` on machines that lack something, each played by a search path of our own.
//!
//! The programs on that path are small shell scripts; a scratch directory stands for the checkout.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Answers what setup asks of a Python, makes environments, and installs a torch of empty files.
///
/// `$MACHINE/no-venv`, `no-network`, `interrupt` and `torch` (a directory) change what it is like;
/// every call leaves a line in `$MACHINE/calls`.
const PYTHON: &str = r#"#!/bin/sh
echo "$*" >> "$MACHINE/calls"
case "$*" in
-c*)
    printf '3\n11\n'
    if [ -e "$MACHINE/no-venv" ]; then echo False; else echo True; fi
    if [ -d "$MACHINE/torch" ]; then echo "$MACHINE/torch"; else echo; fi ;;
"-m venv "*)
    mkdir -p "$3/bin" "$3/lib/python3.11/site-packages"
    cp "$0" "$3/bin/python" ;;
"-m pip install "*)
    echo "Collecting torch==2.11.0"
    torch="${0%/bin/python}/lib/python3.11/site-packages/torch"
    if [ -e "$MACHINE/no-network" ]; then
        echo "WARNING: Retrying after connection broken by 'NewConnectionError': /simple/torch/" >&2
        echo "ERROR: No matching distribution found for torch==2.11.0" >&2
        exit 1
    fi
    mkdir -p "$torch/lib" "$torch/include/torch/csrc/autograd"
    echo "__version__ = '2.11.0+cpu'" > "$torch/version.py"
    : > "$torch/include/torch/csrc/autograd/function.h"
    : > "$torch/lib/libc10.so"; : > "$torch/lib/libtorch.so"; : > "$torch/lib/libtorch_cpu.so"
    if [ -e "$MACHINE/interrupt" ]; then kill -KILL $PPID; exit 1; fi
    echo "Successfully installed torch-2.11.0" ;;
*) echo "unexpected call: $*" >&2; exit 3 ;;
esac
"#;

/// A program being written must not be inherited by a process that another test starts just then: nobody could run it.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A machine that has just what a test gives it.
struct Machine {
    dir: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Machine {
    /// A machine with a C++ compiler and a Python, and a fresh checkout.
    fn new() -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let machine = Self { dir: tempfile::tempdir().expect("a scratch directory"), _turn: turn };
        fs::create_dir_all(machine.path("checkout/xtask")).expect("a scratch directory");
        fs::create_dir_all(machine.path("bin")).expect("a scratch directory");
        // What the scripts themselves are made of.
        for tool in ["sh", "mkdir", "cp"] {
            let real = std::env::split_paths(&std::env::var_os("PATH").expect("a search path"))
                .map(|dir| dir.join(tool))
                .find(|file| file.exists())
                .expect("every Unix has it");
            symlink(real, machine.path("bin").join(tool)).expect("a scratch link");
        }
        machine.program("c++", "#!/bin/sh\necho 'c++ 12.2.0'\n");
        machine.program("python3", PYTHON);
        machine
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.dir.path().join(inside)
    }

    fn program(&self, name: &str, script: &str) {
        let file = self.path("bin").join(name);
        fs::write(&file, script).expect("a scratch file");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("it is ours");
    }

    fn lacks(&self, name: &str) {
        fs::remove_file(self.path("bin").join(name)).expect("it was there");
    }

    fn is(&self, state: &str) {
        fs::write(self.path(state), "").expect("a scratch file");
    }

    fn is_no_longer(&self, state: &str) {
        fs::remove_file(self.path(state)).expect("it was there");
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command
            .arg("setup")
            .current_dir(self.dir.path())
            .env_clear()
            .env("PATH", self.path("bin"))
            .env("MACHINE", self.dir.path())
            // What is installed here is empty files; a disk that is nearly full has room for them.
            .env("FLOWHN_INSTALL_GB", "0")
            .env("CARGO_MANIFEST_DIR", self.path("checkout/xtask"))
            .env("LIBTORCH", self.path("checkout/.libtorch"));
        command
    }

    fn setup(&self) -> Run {
        Run::of(self.command().output().expect("xtask starts"))
    }

    fn calls(&self) -> String {
        fs::read_to_string(self.path("calls")).unwrap_or_default()
    }

    fn link(&self) -> PathBuf {
        fs::read_link(self.path("checkout/.libtorch")).expect("setup made a link")
    }

    fn installed(&self) -> PathBuf {
        PathBuf::from(".venv/lib/python3.11/site-packages/torch")
    }
}

/// How a run of setup ended, and what it said.
struct Run {
    code: Option<i32>,
    said: String,
}

impl Run {
    fn of(output: Output) -> Self {
        // Other commands print results there, and setup runs before them.
        assert_eq!(String::from_utf8_lossy(&output.stdout), "", "setup keeps standard output free");
        Self { code: output.status.code(), said: String::from_utf8_lossy(&output.stderr).into_owned() }
    }

    fn done(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.said);
        self
    }

    /// One failure with one remedy, and these words.
    fn refused(&self, words: &[&str]) {
        assert_eq!(self.code, Some(1), "{}", self.said);
        let count = |start: &str| self.said.lines().filter(|line| line.starts_with(start)).count();
        assert_eq!((count("error: "), count("  help: ")), (1, 1), "{}", self.said);
        for word in words {
            assert!(self.said.contains(word), "{word:?} is not in: {}", self.said);
        }
    }
}

fn fake_torch(dir: &Path, version: &str) {
    for file in ["include/torch/csrc/autograd/function.h", "lib/libc10.so", "lib/libtorch.so", "lib/libtorch_cpu.so"] {
        let file = dir.join(file);
        fs::create_dir_all(file.parent().expect("it is in a directory")).expect("a scratch directory");
        fs::write(file, "").expect("a scratch file");
    }
    fs::write(dir.join("build-version"), version).expect("a scratch file");
}

#[test]
fn a_bare_machine_gets_libtorch_once() {
    let machine = Machine::new();
    let first = machine.setup().done();
    assert!(first.said.contains("4.8 GB"), "it says how large that is: {}", first.said);
    assert!(first.said.contains("Collecting torch"), "pip is seen at work: {}", first.said);
    assert_eq!(machine.link(), machine.installed());

    let calls = machine.calls();
    machine.setup().done();
    assert_eq!(machine.calls(), calls, "the second time no Python is started");
}

#[test]
fn a_missing_compiler_is_named() {
    let machine = Machine::new();
    machine.lacks("c++");
    machine.setup().refused(&["no C++ compiler", "apt install g++"]);
    assert_eq!(machine.calls(), "", "nothing is tried before that");
}

#[test]
fn a_missing_python_is_named() {
    let machine = Machine::new();
    machine.lacks("python3");
    machine.setup().refused(&["no python3", "apt install python3"]);
}

#[test]
fn a_broken_python_is_named() {
    let machine = Machine::new();
    machine.program("python3", "#!/bin/sh\necho 'python3: version 3.13 is not installed' >&2\nexit 127\n");
    machine.setup().refused(&["python3 does not run", "version 3.13 is not installed"]);
}

#[test]
fn a_python_without_venv_is_refused_before_anything_is_made() {
    let machine = Machine::new();
    machine.is("no-venv");
    machine.setup().refused(&["ensurepip", "apt install python3.11-venv"]);
    assert!(!machine.path("checkout/.venv").exists());
}

#[test]
fn a_full_disk_is_refused_before_anything_is_made() {
    let machine = Machine::new();
    let run = Run::of(machine.command().env("FLOWHN_INSTALL_GB", "1e9").output().expect("xtask starts"));
    run.refused(&["needs 1000000000.0 GB free", "make room"]);
    assert!(!machine.path("checkout/.venv").exists());
}

#[test]
fn without_a_network_the_message_says_so_and_the_next_run_succeeds() {
    let machine = Machine::new();
    machine.is("no-network");
    machine.setup().refused(&["cannot be reached", "HTTPS_PROXY"]);
    assert!(!machine.path("checkout/.libtorch").exists());

    machine.is_no_longer("no-network");
    let second = machine.setup().done();
    assert!(second.said.contains("cut short"), "{}", second.said);
    assert_eq!(machine.link(), machine.installed());
}

#[test]
fn an_installation_killed_half_way_is_not_mistaken_for_a_whole_one() {
    let machine = Machine::new();
    machine.is("interrupt");
    assert_eq!(machine.setup().code, None, "killed by a signal");
    assert!(machine.path("checkout").join(machine.installed()).exists(), "torch is there, as far as one can see");
    assert!(!machine.path("checkout/.libtorch").exists());
    let left = machine.path("checkout/.venv/left-over");
    fs::write(&left, "").expect("a scratch file");

    machine.is_no_longer("interrupt");
    let second = machine.setup().done();
    assert!(second.said.contains("cut short"), "{}", second.said);
    assert!(!left.exists(), "the half-made environment is gone");
    assert!(!machine.path("checkout/.venv/tmp").exists(), "so is pip's scratch space");
    assert_eq!(machine.link(), machine.installed());
}

#[test]
fn an_interrupted_installation_into_somebodys_environment_keeps_it() {
    let machine = Machine::new();
    let venv = machine.path("checkout/.venv");
    fs::create_dir_all(venv.join("bin")).expect("a scratch directory");
    fs::copy(machine.path("bin/python3"), venv.join("bin/python")).expect("a scratch file");
    let theirs = venv.join("theirs");
    fs::write(&theirs, "").expect("a scratch file");
    machine.is("interrupt");
    assert_eq!(machine.setup().code, None);

    machine.is_no_longer("interrupt");
    machine.setup().done();
    assert!(theirs.exists());
    assert!(machine.calls().contains("--force-reinstall"), "every package is written again");
}

#[test]
fn a_pytorch_that_is_there_is_used() {
    let machine = Machine::new();
    let torch = machine.path("torch");
    fake_torch(&torch, "2.11.0+cu130");
    machine.setup().done();
    assert_eq!(machine.link(), torch);
    assert!(!machine.path("checkout/.venv").exists());
}

#[test]
fn an_active_environment_comes_before_the_systems() {
    let machine = Machine::new();
    fake_torch(&machine.path("torch"), "2.11.0");
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        let torch = machine.path(variable).join("lib/python3.12/site-packages/torch");
        fake_torch(&torch, "2.11.0");
        let _ = fs::remove_file(machine.path("checkout/.libtorch"));
        let output = machine.command().env(variable, machine.path(variable)).output().expect("xtask starts");
        Run::of(output).done();
        assert_eq!(machine.link(), torch);
    }
    assert_eq!(machine.calls(), "", "no Python is needed for that");
}

#[test]
fn another_version_is_left_alone_and_mentioned() {
    let machine = Machine::new();
    fake_torch(&machine.path("torch"), "2.9.1");
    let run = machine.setup().done();
    assert!(run.said.contains("holds PyTorch 2.9.1, not 2.11.0"), "{}", run.said);
    assert_eq!(machine.link(), machine.installed());
}

#[test]
fn libtorch_of_the_users_choice_is_linked() {
    let machine = Machine::new();
    let chosen = machine.path("chosen");
    let run = || Run::of(machine.command().env("LIBTORCH", &chosen).output().expect("xtask starts"));
    run().refused(&["LIBTORCH is", "holds no libtorch", "unset it"]);
    fake_torch(&chosen, "2.9.1+cpu");
    run().refused(&["holds PyTorch 2.9.1+cpu, not 2.11.0"]);
    fake_torch(&chosen, "2.11.0+cpu");
    run().done();
    assert_eq!(machine.link(), chosen);
    assert_eq!(machine.calls(), "", "no Python is needed for that");
}

#[test]
fn two_setups_at_a_time_install_once() {
    let machine = Machine::new();
    let other = machine.command().stderr(Stdio::null()).spawn().expect("xtask starts");
    machine.setup().done();
    let other = other.wait_with_output().expect("it ends");
    assert!(other.status.success());
    assert_eq!(machine.calls().matches("-m pip install").count(), 1, "{}", machine.calls());
}
