//! Ten steps of `configs/tiny.toml` have the losses that were recorded.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::bench::{command, dir, finish, repo};

/// What two machines may differ by after ten steps: rounding alone gives about 1e-5.
const TOLERANCE: f64 = 1e-3;

#[test]
fn ten_steps_have_the_recorded_losses() {
    let run = dir().join("tiny");
    let cache = format!("data.cache_dir={}", dir().join("tiny-cache").display());
    let sets = ["train.steps=10", "train.eval_batches=1", "train.checkpoint_every=0", &cache];
    let args = ["train", "-c", "configs/tiny.toml", "--run-dir", run.to_str().unwrap()];
    let mut command = command(&args);
    for set in sets {
        command.args(["--set", set]);
    }
    // Both cores: this is the one model here that is large enough to gain from them.
    command.current_dir(repo()).env_remove("OMP_NUM_THREADS").env_remove("RAYON_NUM_THREADS");
    // As someone who starts the program without cargo has it.
    command.env_remove("OMP_WAIT_POLICY");
    finish(command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()).done();

    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = |line: &str| -> Value { serde_json::from_str(line).unwrap() };
    let losses: Vec<f64> = metrics.lines().map(|text| line(text)["loss"].as_f64().unwrap()).collect();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recorded/tiny_losses.json");
    if std::env::var_os("FLOWHN_RECORD").is_some() {
        fs::write(&path, format!("{}\n", serde_json::to_string(&losses).unwrap())).unwrap();
    }
    let recorded: Vec<f64> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let hint = "if tiny.toml was meant to change, record anew with FLOWHN_RECORD=1";
    assert_eq!(losses.len(), recorded.len(), "{hint}");
    for (step, (loss, want)) in losses.iter().zip(&recorded).enumerate() {
        let off = (loss - want).abs() / want;
        assert!(off <= TOLERANCE, "step {}: {loss}, recorded {want}; {hint}", step + 1);
    }
    assert!(losses[9] < losses[0], "{losses:?}");
}
