//! What a golden file is checked for beside the numbers; those are in `tests/selftest.rs`.

use std::fs;
use std::path::{Path, PathBuf};

use flowhn_model::check_golden;
use tch::Device;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// Replaces bytes of a golden file's header, which keeps its length, and writes the result elsewhere.
fn edited(name: &str, from: &str, to: &str) -> tempfile::NamedTempFile {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(golden(name)).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    file
}

#[test]
fn the_models_of_transformers_pass() {
    for name in ["llama", "mamba1", "mamba2", "jamba_seq"] {
        let report = check_golden(&golden(&format!("{name}.safetensors")), Device::Cpu).unwrap();
        assert!(report.pass, "{report:?}");
    }
}

#[test]
fn what_transformers_has_and_we_do_not_is_refused_by_name() {
    for (file, from, to, want) in [
        ("llama", r#"\"hidden_act\": \"silu\""#, r#"\"hidden_act\": \"gelu\""#, "`hidden_act` is \"gelu\""),
        ("jamba_seq", r#"\"num_experts\": 1"#, r#"\"num_experts\": 2"#, "`num_experts` is 2"),
        ("jamba_seq", r#"\"sliding_window\": null"#, r#"\"sliding_window\": 4096"#, "`sliding_window` is 4096"),
        ("mamba2", "[0.0, Infinity]", "[0.1, Infinity]", "`time_step_limit` is [0.1,null]"),
        ("mamba1", r#"\"model_type\": \"mamba\""#, r#"\"model_type\": \"bamba\""#, "is for `bamba`"),
        (
            "falcon_h1_multipliers",
            r#"\"hidden_act\": \"silu\""#,
            r#"\"hidden_act\": \"gelu\""#,
            "`hidden_act` is \"gelu\"",
        ),
        ("falcon_h1_multipliers", r#"\"rope_scaling\": null"#, r#"\"rope_scaling\": 8.00"#, "`rope_scaling` is 8.0"),
        (
            "falcon_h1_multipliers",
            r#"\"key_multiplier\": 0.39"#,
            r#"\"key_multiplier\": 0.00"#,
            "`key_multiplier` has 0",
        ),
        ("mamba2", r#"\"head_dim\": 16"#, r#"\"head_dim\": 32"#, "the two must be equal"),
    ] {
        let file = edited(&format!("{file}.safetensors"), from, to);
        let message = check_golden(file.path(), Device::Cpu).unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    }
}

#[test]
fn another_order_of_groups_does_not_pass() {
    let file = edited(
        "mamba2.safetensors",
        r#"\"transformers_version\": \"4.49.0\""#,
        r#"\"transformers_version\": \"4.52.0\""#,
    );
    let report = check_golden(file.path(), Device::Cpu).unwrap();
    assert!(!report.pass && report.max_rel_logits > 1e-3, "{report:?}");
}

#[test]
fn another_multiplier_or_place_of_a_norm_does_not_pass() {
    for (name, from, to) in [
        ("falcon_h1_multipliers", r#"\"ssm_out_multiplier\": 0.24"#, r#"\"ssm_out_multiplier\": 0.42"#),
        ("falcon_h1_norm_before_gate", r#"\"lm_head_multiplier\": 0.07"#, r#"\"lm_head_multiplier\": 0.08"#),
        (
            "falcon_h1_norm_before_gate",
            r#"\"mamba_norm_before_gate\": true, "#,
            r#"\"mamba_norm_before_gate\": false,"#,
        ),
    ] {
        let report = check_golden(edited(&format!("{name}.safetensors"), from, to).path(), Device::Cpu).unwrap();
        assert!(!report.pass && report.max_rel_logits > 1e-3, "{report:?}");
    }
}

#[test]
fn another_mode_does_not_pass() {
    let file = edited("flowhn_ae_split.safetensors", r#"\"mode\": \"B\""#, r#"\"mode\": \"C\""#);
    let report = check_golden(file.path(), Device::Cpu).unwrap();
    assert!(!report.pass && report.max_rel_logits > 1e-3, "{report:?}");
}

#[test]
fn bad_files_are_named() {
    let message = |path: &Path| check_golden(path, Device::Cpu).unwrap_err().to_string();
    let missing = golden("no_such_file.safetensors");
    assert!(message(&missing).contains("no_such_file"));
    assert!(message(&golden("README.md")).contains("not a safetensors file"));
    let mode = edited("flowhn_ae_split.safetensors", r#"\"mode\": \"B\""#, r#"\"mode\": \"E\""#);
    assert!(message(mode.path()).contains("mode `E`"));
    let renamed = edited("flowhn_ae_split.safetensors", "w.lm_head.weight", "w.lm_haed.weight");
    let renamed = message(renamed.path());
    assert!(
        renamed.contains("missing [\"lm_head.weight\"]") && renamed.contains("left over [\"lm_haed.weight\"]"),
        "{renamed}"
    );
    let torn = tempfile::NamedTempFile::new().unwrap();
    fs::write(torn.path(), &fs::read(golden("flowhn_ae_split.safetensors")).unwrap()[..100_000]).unwrap();
    assert!(message(torn.path()).contains("not a safetensors file"));
}
