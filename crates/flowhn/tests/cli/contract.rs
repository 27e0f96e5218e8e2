//! The JSON that tools read.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::bench::{dir, flowhn, repo};

/// `plan --json` of a configuration in the repository.
fn plan(config: &str, more: &[&str]) -> Value {
    let path = repo().join(config);
    let out = flowhn(&[&["plan", "--json", "--config", path.to_str().unwrap()][..], more].concat());
    let json = out.json();
    out.done();
    json
}

fn integer(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is not a whole number"))
}

/// Checks that spans cover the sequence in order and that everything adds up.
#[track_caller]
fn is_consistent(plan: &Value) {
    is_consistent_behind(plan, 0);
}

/// The same for a model with learned tokens in front of each sequence, which the blocks see and nobody counts.
#[track_caller]
fn is_consistent_behind(plan: &Value, n_meta: u64) {
    let seq_len = integer(&plan["seq_len"]);
    let n_positions = seq_len + n_meta;
    let mut total = integer(&plan["head"]);
    for block in plan["blocks"].as_array().unwrap() {
        let (mut end, mut attn, mut ssm) = (0, 0, 0);
        for span in block["spans"].as_array().unwrap() {
            assert_eq!(integer(&span["start"]), end);
            let len = integer(&span["len"]);
            end += len;
            match span["branch"].as_str().unwrap() {
                "attn" => attn += len,
                "ssm" => ssm += len,
                "both" => (attn, ssm) = (attn + len, ssm + len),
                other => panic!("{other}"),
            }
        }
        assert_eq!((end, attn, ssm), (n_positions, integer(&block["attn_tokens"]), integer(&block["ssm_tokens"])));
        assert_eq!(block["attn_frac"].as_f64().unwrap(), attn as f64 / n_positions as f64);
        let flops = &block["flops"];
        for branch in ["attn", "ssm"] {
            let kinds = ["matmul", "scores", "conv", "scan"].map(|kind| integer(&flops[branch][kind]));
            assert_eq!(kinds.iter().sum::<u64>(), integer(&flops[branch]["total"]));
        }
        total += ["attn", "ssm", "fuse", "mlp"].map(|part| integer(&flops[part]["total"])).iter().sum::<u64>();
    }
    let per_token = |pass: &str| plan["flops_per_token"][pass].as_f64().unwrap();
    assert!((per_token("forward") * seq_len as f64 - total as f64).abs() < 0.5);
    assert!((per_token("backward") - 2. * per_token("forward")).abs() < 1e-6 * per_token("forward"));
    assert!(integer(&plan["parameters"]) > 0);
}

#[test]
fn the_released_shapes_balance_at_576() {
    let report = plan("configs/paper/135m/fac_split.toml", &[]);
    is_consistent(&report);
    assert_eq!(report["seq_len"], 1024);
    for block in report["blocks"].as_array().unwrap() {
        assert_eq!(block["attn_tokens"], 576);
        assert_eq!(block["ssm_tokens"], 448);
        assert_eq!(block["attn_frac"], 0.5625);
    }
    assert_eq!(report["blocks"].as_array().unwrap().len(), 2);
}

#[test]
fn the_balance_is_solved_at_the_length_asked_for() {
    let mut before = 1.;
    for (seq_len, text) in [(256, "256"), (1024, "1024"), (4096, "4096"), (16384, "16384")] {
        // Without rounding to tiles, which is coarse at short lengths.
        let sets = ["--seq-len", text, "--set", "model.split.tile=1"];
        let report = plan("configs/paper/135m/fac_split.toml", &sets);
        is_consistent(&report);
        assert_eq!((&report["seq_len"], &report["training_seq_len"]), (&Value::from(seq_len), &Value::from(seq_len)));
        let frac = report["blocks"][0]["attn_frac"].as_f64().unwrap();
        assert!(frac < before, "attention's share falls with the length: {frac} after {before}");
        before = frac;
    }
    for odd in ["1", "63", "65", "1000"] {
        is_consistent(&plan("configs/paper/135m/fac_split.toml", &["--seq-len", odd]));
    }
}

#[test]
fn every_configuration_plans() {
    fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => walk(&path, files),
                false => files.extend(path.extension().is_some_and(|ext| ext == "toml").then_some(path)),
            }
        }
    }
    let mut files = Vec::new();
    walk(&repo().join("configs"), &mut files);
    assert!(files.len() >= 17, "{files:?}");
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let n_meta = text.lines().find_map(|line| line.strip_prefix("n_meta = "));
        is_consistent_behind(&plan(file.to_str().unwrap(), &[]), n_meta.map_or(0, |n| n.trim().parse().unwrap()));
    }
}

#[test]
fn the_text_form_shows_the_split() {
    let path = repo().join("configs/paper/135m/fac_split.toml");
    let out = flowhn(&["plan", "-c", path.to_str().unwrap(), "--set", "model.n_layers=3"]);
    for want in ["block 2", "fac_split", "576", "scores", "imbalance", "FLOPs/token"] {
        assert!(out.stdout.contains(want), "`{want}` is missing in {out:?}");
    }
    // Halves that swap never mix; that is a warning, and warnings are no result.
    let out = flowhn(&["plan", "-c", path.to_str().unwrap(), "--set", "model.split.policy=ae_split"]);
    assert!(out.stderr.starts_with("warning: ") && out.stderr.contains("never mixes"), "{out:?}");
    assert!(!out.stdout.contains("warning"), "{out:?}");
    out.done();
}

#[test]
fn a_measured_balance_is_refused_until_there_is_a_measurement() {
    let out = flowhn(&["plan", "-c", "micro.toml", "--json", "--set", "model.split.attn_frac=measured"]);
    out.refused(&["attn_frac", "measured", "calibration"]);
}

fn golden_files() -> Vec<String> {
    let dir = repo().join("crates/flowhn-model/tests/golden");
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<String> = paths
        .filter(|path| path.extension().is_some_and(|ext| ext == "safetensors"))
        .map(|path| path.to_str().unwrap().to_owned())
        .collect();
    files.sort();
    assert!(!files.is_empty());
    files
}

#[test]
fn public_implementations_are_computed_exactly() {
    let files = golden_files();
    let args: Vec<&str> = ["golden", "--json"].into_iter().chain(files.iter().map(String::as_str)).collect();
    let out = flowhn(&args);
    let list = out.json();
    out.done();
    assert_eq!(list.as_array().unwrap().len(), files.len());
    for (row, file) in list.as_array().unwrap().iter().zip(&files) {
        assert_eq!(row["file"], file.as_str(), "as given");
        assert_eq!(row["pass"], true, "{row}");
        let within = |key: &str, limit: f64| assert!(row[key].as_f64().unwrap() <= limit, "{key}: {row}");
        within("max_rel_logits", 1e-5);
        within("max_rel_hidden", 1e-5);
        within("max_rel_grad", 1e-4);
        // The files of the released model record no step of an optimiser.
        let stepped = !file.contains("flowhn_");
        if stepped {
            within("max_rel_step", 1e-6);
        }
        assert_eq!(row.as_object().unwrap().len(), 5 + usize::from(stepped), "{row}");
    }
}

#[test]
fn a_file_that_cannot_be_checked_does_not_hide_the_others() {
    let good = &golden_files()[0];
    fs::write(dir().join("not.safetensors"), "text").unwrap();
    let out = flowhn(&["golden", "--json", "not.safetensors", "nowhere.safetensors", good]);
    assert_eq!(out.code, Some(1), "{out:?}");
    let list = out.json();
    for (idx, name) in ["not.safetensors", "nowhere.safetensors"].into_iter().enumerate() {
        let row = &list[idx];
        assert_eq!((&row["file"], &row["pass"], &row["max_rel_logits"]), (&name.into(), &false.into(), &Value::Null));
        assert!(row["error"].as_str().unwrap().contains(name), "{row}");
        assert!(out.stderr.contains(name), "{out:?}");
    }
    assert_eq!(list[2]["pass"], true, "{list}");
    let table = flowhn(&["golden", "not.safetensors", good]);
    assert_eq!(table.code, Some(1));
    assert!(table.stdout.contains("not checked") && table.stdout.contains("pass"), "{table:?}");
}

#[test]
fn weights_that_differ_fail_with_numbers() {
    // The last bytes of the file are the elements of one tensor: one high exponent is an error no limit passes.
    let mut bytes = fs::read(&golden_files()[0]).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&1000f32.to_le_bytes());
    fs::write(dir().join("changed.safetensors"), bytes).unwrap();
    let out = flowhn(&["golden", "--json", "changed.safetensors"]);
    assert_eq!(out.code, Some(1), "{out:?}");
    assert_eq!(out.json()[0]["pass"], false);
    assert!(out.stderr.contains("differ by more than the limits"), "{out:?}");
}
