//! The files of `flowhn bench train` and `flowhn bench context`.

use std::fs;

use serde_json::{Value, json};

use crate::bench::{dir, flowhn, repo};

#[test]
fn a_kept_report_is_written_again_beside_another_programs_speeds() {
    let config = repo().join("configs/tiny.toml").display().to_string();
    let at = |name: &str| dir().join(name).display().to_string();
    let (first, again, other) = (at("speeds"), at("speeds-again"), at("speeds-other.json"));
    let small = ["--set", "train.batch_size=1", "--set", "model.seq_len=64"];
    let measure = ["bench", "train", "--device", "cpu", "--config", &config, "--steps", "1", "--out", &first];
    flowhn(&[&measure[..], &small].concat()).done();
    let theirs =
        json!({"name": "Other", "rows": [{"model": config, "policy": "tiny", "tokens_per_s": 1.5, "mfu": 0.25}]});
    fs::write(&other, theirs.to_string()).unwrap();

    let kept = format!("{first}/train.json");
    flowhn(&["bench", "train", "--from", &kept, "--beside", &other, "--out", &again]).done();
    let read = |folder: &str, file: &str| fs::read_to_string(format!("{folder}/{file}")).unwrap();
    let report = |folder: &str| -> Value { serde_json::from_str(&read(folder, "train.json")).unwrap() };
    assert_eq!(report(&first), report(&again));
    let csv = read(&again, "train.csv");
    assert_eq!(csv.lines().count(), 2);
    assert!(csv.lines().nth(1).unwrap().ends_with(",1.5,0.25"), "{csv}");
    let columns = |line: &str| line.split(',').count();
    assert!(csv.lines().all(|line| columns(line) == columns(csv.lines().next().unwrap())), "{csv}");
    assert!(read(&again, "train.svg").contains("Other") && !read(&first, "train.svg").contains("Other"));

    flowhn(&["bench", "train", "--from", &other, "--out", &again]).refused(&[
        "--from",
        "speeds-other.json",
        "train.json that",
    ]);
    flowhn(&["bench", "train", "--from", &kept, "--beside", &kept, "--out", &again])
        .refused(&["--beside", "tokens_per_s"]);
}

#[test]
fn a_kept_curve_is_drawn_again_with_its_crossing() {
    let at = |name: &str| dir().join(name).display().to_string();
    let (kept, out) = (at("curve.json"), at("curve"));
    let row = |seq_len: u64, split: f64, attention: f64| json!({"seq_len": seq_len, "attn_frac": 0.5, "split_tokens_per_s": split, "attention_tokens_per_s": attention});
    let rows = [row(1024, 9., 10.), row(4096, 8., 7.)];
    fs::write(&kept, json!({"device": "a GPU", "size": "1b", "tokens_per_step": 4096, "rows": rows}).to_string())
        .unwrap();
    let told = flowhn(&["bench", "context", "--from", &kept, "--out", &out]).done();
    assert!(told.contains("faster from 2048 tokens"), "{told}");
    let read = |file: &str| fs::read_to_string(format!("{out}/{file}")).unwrap();
    assert!(read("context.svg").contains("split faster from 2048"));
    assert_eq!(read("context.csv").lines().count(), 3);
    fs::write(&kept, "{}").unwrap();
    flowhn(&["bench", "context", "--from", &kept, "--out", &out]).refused(&[
        "--from",
        "curve.json",
        "context.json that",
    ]);
}
