//! Zero-shot tasks, and the paper's table that is filled with them.

use std::fs;
use std::process::Stdio;

use serde_json::Value;

use crate::bench::{Out, command, dir, finish, flowhn, repo, whole};

const TASKS: [&str; 7] = ["arc_challenge", "arc_easy", "boolq", "hellaswag", "lambada_openai", "piqa", "winogrande"];

fn shipped() -> String {
    repo().join("data/eval").display().to_string()
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

#[test]
fn eval_answers_tasks_and_keeps_what_it_found() {
    whole();
    let data = shipped();
    let samples = dir().join("samples.jsonl").display().to_string();
    let args = [
        "eval",
        "--checkpoint",
        "whole",
        "--tasks",
        "all",
        "--eval-data",
        &data,
        "--limit",
        "3",
        "--samples",
        &samples,
    ];
    let out = flowhn(&[&args[..], &["--json"]].concat());
    let report = out.json();
    assert_eq!(keys(&report["accuracy"]), TASKS);
    for score in report["tasks"].as_array().unwrap() {
        assert_eq!((score["items"].as_u64(), score["items_in_file"].as_u64()), (Some(3), Some(100)), "{score}");
        let accuracy = score["accuracy"].as_f64().unwrap();
        assert!(
            (0. ..=1.).contains(&accuracy) && report["accuracy"][score["task"].as_str().unwrap()] == accuracy,
            "{score}"
        );
        assert_eq!(score["perplexity"].is_number(), score["task"] == "lambada_openai", "{score}");
        assert_eq!(score["chance"].is_number(), score["task"] != "lambada_openai", "{score}");
    }
    assert!(report.get("loss").is_none(), "no text was scored");
    let kept = dir().join("whole/eval-step-40.json");
    assert_eq!(serde_json::from_slice::<Value>(&fs::read(&kept).unwrap()).unwrap(), report);
    assert!(!dir().join("whole/.eval-step-40.json.partial").exists(), "what is safe needs no second copy");
    assert_eq!(fs::read_to_string(&samples).unwrap().lines().count(), 3 * TASKS.len());
    out.done();

    let told =
        flowhn(&["eval", "--checkpoint", "whole", "--tasks", "piqa,boolq", "--eval-data", &data, "--limit", "2"])
            .done();
    assert!(["piqa", "boolq", "majority", "±"].iter().all(|word| told.contains(word)), "{told}");
    flowhn(&["eval", "--checkpoint", "whole", "--tasks", "pika", "--eval-data", &data]).refused(&["pika", "piqa"]);
    assert_eq!(flowhn(&["eval", "--checkpoint", "whole"]).code, Some(2), "neither text nor tasks");
}

/// Two rows of the tiny table on the shared text; everything else as users call it.
fn table(more: &[&str]) -> Out {
    let shared = |name: &str| dir().join(name).display().to_string();
    let (data, valid, tokenizer, out) =
        (shared("train.jsonl"), shared("valid.jsonl"), shared("tokenizer.json"), shared("table"));
    let cache = format!("data.cache_dir=\"{}\"", shared("cache"));
    let args = [
        "bench",
        "paper",
        "--device",
        "cpu",
        "--size",
        "tiny",
        "--rows",
        "llama,fac_split",
        "--limit",
        "2",
        "--steps",
        "2",
        "--json",
        "--data",
        &data,
        "--valid",
        &valid,
        "--tokenizer",
        &tokenizer,
        "--out",
        &out,
        "--set",
        "model.vocab_size=320",
        "--set",
        &cache,
    ];
    let mut command = command(&[&args[..], more].concat());
    finish(command.current_dir(repo()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

#[test]
fn the_papers_table_is_filled_row_by_row_and_kept() {
    let speed = table(&["--train-tokens", "0"]);
    let first = speed.json();
    assert_eq!(first["rows"][1]["accuracy"], serde_json::json!({}), "nothing is trained yet");
    speed.done();

    let filled = table(&["--train-tokens", "2048"]);
    assert!(!filled.stderr.contains("timing"), "speeds are kept: {filled:?}");
    let report = filled.json();
    assert!(
        report["definition"].as_str().unwrap().contains("median") && report["device"].as_str().unwrap().contains("CPU")
    );
    let rows = report["rows"].as_array().unwrap();
    assert_eq!([&rows[0]["model"], &rows[1]["model"]], ["llama", "fac_split"]);
    for (row, before) in rows.iter().zip(first["rows"].as_array().unwrap()) {
        assert_eq!(keys(&row["accuracy"]), TASKS);
        assert_eq!(row["tokens_per_s"], before["tokens_per_s"]);
        assert!(row["tokens_per_s"].as_f64().unwrap() > 0. && row["mfu"].as_f64().unwrap() > 0., "{row}");
        assert_eq!(row["trained_tokens"], 2048);
        assert!(row["epochs"].as_f64().unwrap() > 0. && row["stderr"]["boolq"].is_number(), "{row}");
    }
    for (file, word) in
        [("table.md", "| Llama |"), ("table.csv", "fac_split,"), ("table.json", "definition"), ("figure.svg", "</svg>")]
    {
        assert!(fs::read_to_string(dir().join("table").join(file)).unwrap().contains(word), "{file}");
    }
    filled.done();

    // A row that lost its results, but not its run, is taken up where it stood; the other is not touched.
    fs::remove_file(dir().join("table/llama/train.json")).unwrap();
    fs::remove_file(dir().join("table/llama/eval.json")).unwrap();
    let again = table(&["--train-tokens", "2048"]);
    assert_eq!(again.json()["rows"][0]["accuracy"], report["rows"][0]["accuracy"]);
    assert_eq!(again.json()["rows"][1], report["rows"][1]);
    again.done();

    // What a row was found on is kept with it, and is not what this command runs on.
    let path = dir().join("table/fac_split/speed.json");
    let mut kept: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    assert!(kept["result"]["device"].as_str().unwrap().contains("CPU"), "{kept}");
    kept["result"]["device"] = "another device".into();
    fs::write(&path, kept.to_string()).unwrap();
    let told = table(&["--train-tokens", "2048", "--skip", "speed,train,eval"]).json();
    let device = told["device"].as_str().unwrap();
    assert!(device.starts_with("CPU") && device.ends_with(" and another device"), "{device}");
    assert_eq!(told["rows"][1]["device"], "another device");

    table(&["--train-tokens", "4096"]).refused(&["llama/run", "--out"]);
}
