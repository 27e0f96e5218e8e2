//! One run, one process, one directory.

mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::storage::ReadOnly;
use common::{Bench, fresh, resume};
use flowhn_train::run_dir::{RunDir, Start};
use flowhn_train::storage::Disk;
use flowhn_train::{Error, TrainOptions, Trainer};

fn open(path: &Path, start: Start) -> Result<RunDir, Error> {
    RunDir::open(path, start, Arc::new(Disk))
}

#[test]
fn a_second_run_in_the_directory_is_refused_and_told_who_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("runs/tiny");
    let first = open(&path, Start::Fresh).unwrap();
    let error = open(&path, Start::Fresh).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::RunLocked { .. }), "{text}");
    assert!(text.contains(&format!("process {}", std::process::id())) && text.contains("run.dir"), "{text}");
    drop(first);
    open(&path, Start::Fresh).unwrap();
}

#[test]
fn the_lock_holds_between_processes_and_goes_with_its_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run");
    let run_again = || {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "helper_that_holds_a_lock", "--ignored", "--nocapture", "--test-threads=1"]);
        command.env("FLOWHN_TEST_LOCK", &path).stdout(Stdio::piped()).stdin(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut holder = run_again();
    let mut out = BufReader::new(holder.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("locked") {
        line.clear();
        assert!(out.read_line(&mut line).unwrap() > 0, "the helper ended early");
    }
    let error = open(&path, Start::Fresh).unwrap_err().to_string();
    assert!(error.contains(&format!("process {}", holder.id())), "{error}");
    holder.kill().unwrap();
    holder.wait().unwrap();
    open(&path, Start::Fresh).unwrap();
}

/// Not a test of its own: the other process of the test above.
#[test]
#[ignore = "run by the_lock_holds_between_processes_and_goes_with_its_process"]
fn helper_that_holds_a_lock() {
    let Ok(path) = std::env::var("FLOWHN_TEST_LOCK") else { return };
    let _run = open(Path::new(&path), Start::Fresh).unwrap();
    println!("locked");
    // Holds on until the parent kills it, or is gone itself.
    let _ = std::io::stdin().read_line(&mut String::new());
}

#[test]
fn a_directory_with_a_run_asks_for_resume_and_one_without_refuses_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run");
    let error = open(&path, Start::Resume).unwrap_err().to_string();
    assert!(error.contains("holds no run") && error.contains("without --resume"), "{error}");
    drop(open(&path, Start::Fresh).unwrap());
    // A start that failed before anything was trained is no run yet.
    drop(open(&path, Start::Fresh).unwrap());
    std::fs::write(path.join("config.toml"), "").unwrap();
    let error = open(&path, Start::Fresh).unwrap_err().to_string();
    assert!(error.contains("already holds a run") && error.contains("--resume"), "{error}");
    open(&path, Start::Resume).unwrap();
}

#[test]
fn a_directory_that_cannot_be_written_is_named_with_a_remedy() {
    let bench = Bench::new();
    let config = bench.config("nowhere", &[]);
    let options = TrainOptions { storage: Arc::new(ReadOnly), ..fresh() };
    let error = Trainer::new(&config, &options, &mut ()).err().unwrap();
    assert!(matches!(error, Error::RunDirUnwritable { .. }));
    let text = error.to_string();
    assert!(text.contains("runs/nowhere") && text.contains("choose another directory with run.dir"), "{text}");
    // A file in the way is the same to the user.
    std::fs::create_dir_all(bench.path("runs")).unwrap();
    std::fs::write(bench.path("runs/nowhere"), "").unwrap();
    assert!(matches!(Trainer::new(&config, &fresh(), &mut ()).err().unwrap(), Error::RunDirUnwritable { .. }));
    assert!(matches!(Trainer::new(&config, &resume(), &mut ()).err().unwrap(), Error::NothingToResume { .. }));
}
