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
