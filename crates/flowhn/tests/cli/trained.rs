//! What one does with a run: read its results, evaluate it, let it speak.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use serde_json::Value;

use crate::bench::{command, dir, finish, flowhn, whole};

fn validation() -> Value {
    let text = fs::read_to_string(dir().join("whole/validation.jsonl")).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

#[test]
fn training_tells_what_it_does_and_what_came_out() {
    let sets = ["--set", "train.steps=6", "--set", "model.split.policy=fac_split"];
    let out = flowhn(&[&["train", "-c", "micro.toml", "--run-dir", "told", "--keep-last", "1"][..], &sets].concat());
    for want in ["parameters", "ssm_all, then fac_split", "memory", "at least", "step 6/6  loss", "validation:"] {
        assert!(out.stderr.contains(want), "`{want}` is missing in {out:?}");
    }
    let run = dir().join("told");
    let stdout = out.done();
    let summary: Value = serde_json::from_slice(&fs::read(run.join("summary.json")).unwrap()).unwrap();
    let bits = |key: &str| format!("{:.4} bits/byte", summary[key].as_f64().unwrap());
    let want = [
        &bits("val_bits_per_byte"),
        &bits("unigram_bits_per_byte"),
        "told/loss.svg",
        "the fox",
        "% of the matmul rate",
    ];
    for want in want {
        assert!(stdout.contains(want), "`{want}` is missing in {stdout}");
    }
    for file in ["config.toml", "loss.svg", "metrics.jsonl", "tokenizer.json", "checkpoints/step-6/state.json"] {
        assert!(run.join(file).exists(), "{file}");
    }
    assert!(!run.join("checkpoints/step-3").exists(), "--keep-last 1 keeps the last alone");
}

#[test]
fn the_summary_has_what_tools_read() {
    let args = ["train", "-c", "micro.toml", "--run-dir", "summed", "--set", "train.steps=4", "--json"];
    let out = flowhn(&args);
    let printed = out.json();
    out.done();
    let written: Value = serde_json::from_slice(&fs::read(dir().join("summed/summary.json")).unwrap()).unwrap();
    assert_eq!(printed, written);
    assert_eq!(printed["tokens"], 4 * 4 * 2 * 64);
    for key in
        ["parameters", "seconds", "tokens_per_s", "val_loss", "val_bits_per_byte", "unigram_bits_per_byte", "mfu"]
    {
        assert!(printed[key].as_f64().is_some_and(|value| value > 0.), "{key}: {printed}");
    }
}

#[test]
fn the_small_run_has_learned() {
    whole();
    let summary: Value = serde_json::from_slice(&fs::read(dir().join("whole/summary.json")).unwrap()).unwrap();
    let bits = |key: &str| summary[key].as_f64().unwrap();
    assert!(bits("val_bits_per_byte") < 0.85 * bits("unigram_bits_per_byte"), "{summary}");
}

#[test]
fn eval_agrees_with_the_validation_of_the_run() {
    whole();
    for checkpoint in ["whole", "whole/checkpoints", "whole/checkpoints/step-40"] {
        let out = flowhn(&["eval", "--checkpoint", checkpoint, "--data", "valid.jsonl", "--json"]);
        let report = out.json();
        let of_run = validation();
        for (key, key_of_run) in [("loss", "val_loss"), ("bits_per_byte", "val_bits_per_byte")] {
            let (got, want) = (report[key].as_f64().unwrap(), of_run[key_of_run].as_f64().unwrap());
            assert!((got - want).abs() < 1e-9 * want, "{key}: {got}, {want} in the run");
        }
        assert_eq!(report["step"], 40);
        out.done();
    }
    let text = flowhn(&["eval", "--checkpoint", "whole", "--data", "valid.jsonl", "--data", "train.jsonl"]).done();
    assert!(text.contains("nats/token") && text.contains("bits/byte") && text.contains("train.jsonl"), "{text}");
}

#[test]
fn an_older_checkpoint_is_itself() {
    whole();
    let eval = |step: &str| {
        let checkpoint = format!("whole/checkpoints/step-{step}");
        flowhn(&["eval", "--checkpoint", &checkpoint, "--data", "valid.jsonl", "--json"]).json()["loss"].clone()
    };
    assert_ne!(eval("36"), eval("40"));
}

#[test]
fn the_seed_decides_the_text() {
    whole();
    let generate = |seed: &str| {
        let args = ["--prompt", "the fox", "--max-tokens", "40", "--temperature", "1.5", "--seed", seed];
        flowhn(&[&["generate", "--checkpoint", "whole"][..], &args].concat()).done()
    };
    let text = generate("3");
    assert!(text.trim().len() > 10, "{text:?}");
    assert_eq!(text, generate("3"));
    assert_ne!(text, generate("4"));
}

#[test]
fn a_prompt_comes_from_standard_input() {
    whole();
    let args = ["generate", "--checkpoint", "whole", "--max-tokens", "20", "--prompt"];
    let want = flowhn(&[&args[..], &["a crow hears"]].concat()).done();
    let mut child = command(&[&args[..], &["-"]].concat());
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"a crow hears").unwrap();
    assert_eq!(finish(child).done(), want);
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    whole();
    let mut child = command(&["generate", "--checkpoint", "whole", "--prompt", "the fox", "--max-tokens", "200"]);
    let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let out = finish(child);
    assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""), "{out:?}");
}

#[test]
fn shards_are_built_ahead() {
    let args = ["data", "build", "-c", "micro.toml", "--set", "data.cache_dir=ahead"];
    let first = flowhn(&args);
    assert!(first.stderr.contains("tokenised train.jsonl: 160 documents"), "{first:?}");
    let second = flowhn(&args);
    assert_eq!(second.stderr, "", "the second time there is nothing to do");
    assert_eq!(first.done(), second.done());
}

#[test]
fn help_and_version_tell_what_is_there() {
    let help = flowhn(&["train", "--help"]).done();
    for policy in flowhn_split::POLICIES {
        assert!(help.contains(policy.name()) && help.contains("model.split.policy"), "{policy:?}: {help}");
    }
    let version = flowhn(&["--version"]).done();
    assert!(version.starts_with(&format!("flowhn {}", env!("CARGO_PKG_VERSION"))), "{version}");
    assert!(version.contains("libtorch 2.") && version.contains("/lib"), "{version}");
}
