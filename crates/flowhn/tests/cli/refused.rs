//! What cannot work is refused with one line that names the thing and the remedy.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use crate::bench::{command, copy, dir, flowhn, wait_for, whole};

/// Trains the small configuration with an override, into a directory of its own.
fn train_with(set: &str) -> crate::bench::Out {
    flowhn(&["train", "-c", "micro.toml", "--run-dir", "refused", "--set", set])
}

#[test]
fn an_unknown_key_gets_the_nearest_one() {
    train_with("train.stepz=3").refused(&["micro.toml", "train.stepz", "did you mean `steps`"]);
    train_with("model.attn.n_head=3").refused(&["model.attn.n_head", "did you mean `n_heads`"]);
    train_with("tokenizr.x=3").refused(&["unknown key"]);
}

#[test]
fn impossible_values_are_named() {
    train_with("model.attn.n_heads=5").refused(&["model.attn.n_heads", "d_model = 32", "set model.attn.d_head"]);
    train_with("model.split.policy=\"cyclc_split\"").refused(&["cyclc_split", "cyclic_split"]);
    train_with("train.batch_size=0").refused(&["train.batch_size = 0", "at least 1"]);
    train_with("train.lr=fast").refused(&["train.lr", "string"]);
    train_with("train.steps").refused(&["train.steps", "key=value"]);
    train_with("model.seq_len=1000000").refused(&["fewer than one sequence of 1000000", "lower model.seq_len"]);
}

#[test]
fn a_missing_file_is_named() {
    let out = flowhn(&["train", "-c", "nowhere.toml"]);
    out.refused(&["nowhere.toml"]);
    assert_eq!(out.stderr.matches("nowhere.toml").count(), 1, "{out:?}");
    train_with("data.train=[\"nowhere.jsonl\"]").refused(&["nowhere.jsonl", "no such file", "check the path"]);
    train_with("data.tokenizer=nowhere.json").refused(&["nowhere.json"]);
    train_with("data.valid=[]").refused(&["data.valid", "valid_frac"]);
}

#[test]
fn a_vocabulary_too_small_for_the_tokenizer_is_refused() {
    train_with("model.vocab_size=257").refused(&["tokenizer.json", "300 entries", "model.vocab_size to at least 300"]);
}

#[test]
fn another_tokenizer_is_refused() {
    whole();
    let args = ["--checkpoint", "whole", "--tokenizer", "other.json"];
    let eval = [&["eval"][..], &args, &["--data", "valid.jsonl"]].concat();
    let want = ["step-40", "was made with tokenizer", "other.json", "use the tokenizer it was made with"];
    flowhn(&eval).refused(&want);
    flowhn(&[&["generate"][..], &args, &["--prompt", "the fox"]].concat()).refused(&want);
    // A copy in the run's directory that was exchanged is a foreign one as well.
    let run = copy("whole", "exchanged");
    fs::copy(dir().join("other.json"), run.join("tokenizer.json")).unwrap();
    flowhn(&["generate", "--checkpoint", "exchanged", "--prompt", "x"]).refused(&["exchanged/tokenizer.json"]);
}

#[test]
fn a_directory_that_holds_a_run_is_refused() {
    whole();
    let out = flowhn(&["train", "-c", "micro.toml", "--run-dir", "whole"]);
    out.refused(&["run.dir whole already holds a run", "--resume"]);
}

#[test]
fn a_resume_without_a_run_is_refused() {
    let out = flowhn(&["train", "-c", "micro.toml", "--run-dir", "nothing", "--resume"]);
    out.refused(&["run.dir nothing holds no run", "without --resume"]);
    flowhn(&["train", "--run-dir", "nothing", "--resume"]).refused(&["run.dir nothing holds no run"]);
}

#[test]
fn a_resume_with_other_settings_is_refused() {
    whole();
    copy("whole", "other-lr");
    let out = flowhn(&["train", "-c", "micro.toml", "--run-dir", "other-lr", "--resume", "--set", "train.lr=9e-3"]);
    out.refused(&["made with train.lr = 0.005", "0.009", "restore the value"]);
}

#[test]
fn two_runs_in_one_directory_are_refused() {
    let mut first = command(&["train", "-c", "micro.toml", "--run-dir", "shared", "--set", "train.steps=100000"]);
    let mut first = first.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    assert!(wait_for(&mut first, Duration::from_millis(5), || dir().join("shared/config.toml").exists()));
    let second = flowhn(&["train", "-c", "micro.toml", "--run-dir", "shared", "--resume"]);
    first.kill().unwrap();
    first.wait().unwrap();
    second.refused(&["run.dir shared is in use by", &format!("process {}", first.id())]);
}

#[test]
fn a_run_directory_that_cannot_be_made_is_refused() {
    // A directory below a file cannot be made even by root.
    fs::write(dir().join("file"), "").unwrap();
    flowhn(&["train", "-c", "micro.toml", "--run-dir", "file/run"]).refused(&[
        "file/run",
        "cannot be written",
        "run.dir",
    ]);
}

#[test]
fn divergence_stops_with_the_step_and_the_text() {
    let args =
        ["train", "-c", "micro.toml", "--run-dir", "diverged", "--set", "train.lr=1e30", "--set", "train.clip_norm=0"];
    flowhn(&args).refused(&["step ", "diverged", "train.jsonl:", "last good checkpoint", "lower train.lr"]);
}

#[test]
fn a_place_without_a_checkpoint_is_refused() {
    fs::create_dir_all(dir().join("empty")).unwrap();
    flowhn(&["eval", "--checkpoint", "empty", "--data", "valid.jsonl"]).refused(&["empty", "no usable checkpoint"]);
    flowhn(&["generate", "--checkpoint", "nowhere", "--prompt", "x"]).refused(&["nowhere", "no usable checkpoint"]);
    flowhn(&["generate", "--checkpoint", "micro.toml", "--prompt", "x"])
        .refused(&["micro.toml", "not a FlowHN checkpoint"]);
}

#[test]
fn options_out_of_range_are_refused() {
    whole();
    let generate = |option, value| flowhn(&["generate", "--checkpoint", "whole", "--prompt", "x", option, value]);
    generate("--temperature", "-1").refused(&["temperature = -1", "at least 0"]);
    generate("--top-p", "1.5").refused(&["top_p = 1.5", "at most 1"]);
    let args = ["data", "tokenizer", "--input", "train.jsonl", "--vocab-size", "100", "--out", "small.json"];
    flowhn(&args).refused(&["at least 257", "100 were asked for"]);
}

#[test]
fn a_device_that_is_not_there_is_refused() {
    // No machine has that many; one without any says so.
    flowhn(&["golden", "--device", "cuda:99", "x.safetensors"]).refused(&["--device cuda", "CUDA device"]);
}

#[test]
fn a_command_line_that_makes_no_sense_is_a_usage_error() {
    let lines: [&[&str]; 8] = [
        &[],
        &["fly"],
        &["train"],
        &["train", "--resume"],
        &["plan", "--config", "micro.toml", "--seq-len", "0"],
        &["golden"],
        &["eval", "--checkpoint", "whole"],
        &["train", "-c", "micro.toml", "--device", "gpu"],
    ];
    for line in lines {
        let out = flowhn(line);
        assert_eq!(out.code, Some(2), "{line:?}: {out:?}");
        assert_eq!(out.stdout, "", "{line:?}");
        assert!(!out.stderr.is_empty(), "{line:?}");
    }
}
