//! Public implementations, to the digit: golden files of this crate, built in.

use std::path::Path;

use flowhn_torch::testing::Case;
use tch::Device;

use super::{case, ensure};
use crate::golden::check_golden_bytes;
use crate::{MAX_REL_GRAD, MAX_REL_OUTPUT, Result};

const FILES: [(&str, &[u8]); 11] = [
    ("flowhn_no_split", include_bytes!("../../tests/golden/flowhn_no_split.safetensors")),
    ("flowhn_ae_split", include_bytes!("../../tests/golden/flowhn_ae_split.safetensors")),
    ("flowhn_fa_split", include_bytes!("../../tests/golden/flowhn_fa_split.safetensors")),
    ("llama_biases_mqa", include_bytes!("../../tests/golden/llama_biases_mqa.safetensors")),
    ("llama_scaled_positions", include_bytes!("../../tests/golden/llama_scaled_positions.safetensors")),
    ("mamba_untied_biases", include_bytes!("../../tests/golden/mamba_untied_biases.safetensors")),
    ("mamba2_one_group_tied", include_bytes!("../../tests/golden/mamba2_one_group_tied.safetensors")),
    ("mamba2_strided_biases", include_bytes!("../../tests/golden/mamba2_strided_biases.safetensors")),
    ("jamba_offset_biases", include_bytes!("../../tests/golden/jamba_offset_biases.safetensors")),
    ("falcon_h1_multipliers", include_bytes!("../../tests/golden/falcon_h1_multipliers.safetensors")),
    ("falcon_h1_norm_before_gate", include_bytes!("../../tests/golden/falcon_h1_norm_before_gate.safetensors")),
];

pub(super) fn cases() -> Vec<Case> {
    let files = FILES
        .into_iter()
        .map(|(name, bytes)| case(format!("golden: {name}"), move |device| passes(name, bytes, device)));
    let fac = case("golden: flowhn_fac_split, which equals flowhn_ae_split at even lengths".to_owned(), fac_split);
    files.chain([fac]).collect()
}

fn passes(name: &str, bytes: &[u8], device: Device) -> Result<String> {
    let report = check_golden_bytes(Path::new(name), bytes, device)?;
    let (output, grad) = (report.max_rel_logits.max(report.max_rel_hidden), report.max_rel_grad);
    let found = format!("outputs {output:.1e}, gradients {grad:.1e}");
    ensure(report.pass, || format!("{found}; allowed {MAX_REL_OUTPUT:.0e} and {MAX_REL_GRAD:.0e}"))?;
    Ok(found)
}

fn fac_split(device: Device) -> Result<String> {
    let (name, bytes) = FILES[1];
    let (from, to) = (br#"\"mode\": \"B\""#, br#"\"mode\": \"D\""#);
    let at = bytes.windows(from.len()).position(|window| window == from);
    let at = at.ok_or_else(|| crate::Error::Input(format!("{name} states no mode B")))?;
    let edited = [&bytes[..at], to, &bytes[at + to.len()..]].concat();
    passes(name, &edited, device)
}
