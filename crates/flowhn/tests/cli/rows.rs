//! Every row of the paper's table from its configuration to text.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::bench::{Out, command, dir, finish, repo};

/// Where the configurations' paths to the corpus lead.
fn in_repo(mut command: Command) -> Out {
    finish(command.current_dir(repo()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

fn trains_and_speaks(row: &Path) {
    let run = dir().join("rows").join(row.file_stem().unwrap());
    let (row, run) = (row.to_str().unwrap(), run.to_str().unwrap());
    let cache = format!("data.cache_dir={}", dir().join("rows-cache").display());
    let mut train = command(&["train", "-c", row, "--run-dir", run]);
    for set in ["train.steps=2", "train.eval_every=0", "train.eval_batches=1", "train.log_every=1", &cache] {
        train.args(["--set", set]);
    }
    in_repo(train).done();
    let metrics = fs::read_to_string(Path::new(run).join("metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 2, "{row}");
    let said = in_repo(command(&["generate", "--checkpoint", run, "--prompt", "The city", "--max-tokens", "4"])).done();
    assert!(!said.trim().is_empty(), "{row} says nothing");
}

#[test]
fn every_row_of_the_table_trains_and_speaks() {
    let folder = repo().join("configs/paper/tiny");
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let rows: Vec<_> = paths.filter(|path| !path.ends_with("base.toml")).collect();
    assert_eq!(rows.len(), 10);
    rows.iter().for_each(|row| trains_and_speaks(row));
}
