//! Subcommands of `flowhn` through xtask. A scratch directory stands for the checkout, shell scripts for cargo and flowhn.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A program being written must not be inherited by a process that another test starts just then: nobody could run it.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A checkout with libtorch set up, a copy of xtask where cargo would have built it, and a cargo that "builds" flowhn.
struct Checkout {
    dir: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Checkout {
    fn new(flowhn: &str) -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let checkout = Self { dir: tempfile::tempdir().expect("a scratch directory"), _turn: turn };
        for dir in ["xtask", "target/debug", "target/release", "elsewhere"] {
            fs::create_dir_all(checkout.path(dir)).expect("a scratch directory");
        }
        for file in
            ["include/torch/csrc/autograd/function.h", "lib/libc10.so", "lib/libtorch.so", "lib/libtorch_cpu.so"]
        {
            let file = checkout.path(".libtorch").join(file);
            fs::create_dir_all(file.parent().expect("it is in a directory")).expect("a scratch directory");
            fs::write(file, "").expect("a scratch file");
        }
        fs::write(checkout.path(".libtorch/build-version"), "2.11.0+cpu").expect("a scratch file");
        fs::copy(env!("CARGO_BIN_EXE_xtask"), checkout.path("target/debug/xtask")).expect("a scratch file");
        checkout.program("target/release/flowhn", flowhn);
        checkout.cargo("echo built");
        checkout
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.dir.path().join(inside)
    }

    fn program(&self, path: &str, script: &str) {
        fs::write(self.path(path), format!("#!/bin/sh\n{script}\n")).expect("a scratch file");
        fs::set_permissions(self.path(path), fs::Permissions::from_mode(0o755)).expect("it is ours");
    }

    /// What the build does; it is told its arguments.
    fn cargo(&self, script: &str) {
        self.program("cargo", script);
    }

    fn xtask(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.path("target/debug/xtask"));
        command
            .args(args)
            .current_dir(self.path("elsewhere"))
            .env("CARGO", self.path("cargo"))
            .env("CARGO_MANIFEST_DIR", self.path("xtask"))
            .env("CARGO_PKG_NAME", "xtask")
            .env("CXX", "true")
            .env_remove("LIBTORCH")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("the scripts speak UTF-8")
}

#[test]
fn only_the_program_speaks_on_standard_output() {
    let checkout = Checkout::new("echo \"$@\"; pwd; echo \"$LD_LIBRARY_PATH\"; echo \"<$CARGO_PKG_NAME>\"");
    checkout.cargo("echo \"cargo $*\"");
    let output = checkout.xtask(&["plan", "--json", "--config", "a b.toml"]).output().expect("xtask starts");
    let stdout = text(&output.stdout);
    let lines: Vec<_> = stdout.lines().collect();
    assert_eq!(lines[0], "plan --json --config a b.toml");
    let root = checkout.dir.path().canonicalize().expect("it exists");
    assert_eq!(Path::new(lines[1]).canonicalize().expect("it exists"), root, "it runs in the checkout's root");
    assert!(lines[2].starts_with(&checkout.path(".libtorch/lib").to_string_lossy().into_owned()), "{}", lines[2]);
    assert_eq!(lines[3], "<>", "it is not told that it is xtask");
    assert_eq!(lines.len(), 4, "{stdout}");
    assert_eq!(text(&output.stderr), "cargo build --release --package flowhn\n");
}

#[test]
fn train_has_a_default_config() {
    let checkout = Checkout::new("echo \"$@\"");
    let said = |args: &[&str]| text(&checkout.xtask(args).output().expect("xtask starts").stdout);
    assert_eq!(said(&["train"]), "train --config configs/tiny.toml\n");
    assert_eq!(said(&["train", "--config=b.toml"]), "train --config=b.toml\n");
}

#[test]
fn the_exit_code_is_the_programs() {
    for code in [0, 1, 2, 130] {
        let checkout = Checkout::new(&format!("exit {code}"));
        let status = checkout.xtask(&["eval"]).status().expect("xtask starts");
        assert_eq!(status.code(), Some(code));
    }
}

#[test]
fn the_program_takes_xtasks_place() {
    // A Ctrl-C reaches it, and whoever waits for xtask waits for it.
    let checkout = Checkout::new("echo $$");
    let child = checkout.xtask(&["generate"]).spawn().expect("xtask starts");
    let pid = child.id();
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(text(&output.stdout).trim(), pid.to_string());
}

#[test]
fn what_does_not_build_is_not_run() {
    let checkout = Checkout::new("echo ran");
    checkout.cargo("echo 'error[E0308]: mismatched types' >&2; exit 101");
    let output = checkout.xtask(&["train"]).output().expect("xtask starts");
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), ""));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("mismatched types"), "{stderr}");
    assert!(
        stderr.ends_with("error: `cargo build --release --package flowhn` failed (exit status: 101)\n"),
        "{stderr}"
    );
}
