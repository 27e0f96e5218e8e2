//! `state.json`: where a run stood, and what the other files of the checkpoint must be.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

use serde::{Deserialize, Serialize};
use tch::Device;

use super::CheckpointProblem;
use crate::data::{Fingerprint, SamplerState};

/// What `state.json` says it is.
pub const FORMAT: &str = "flowhn-checkpoint";

/// The version that this build writes; it reads every version up to it. Version 2 adds the device.
pub const VERSION: u32 = 2;

/// Where a run stood when it was saved.
///
/// A training step draws no random numbers: initial values follow from the seed, and the order of the text from the
/// sampler's state. So there is no further generator to save.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Seconds spent in the training loop, over all sittings.
    pub elapsed_s: f64,
    /// Threads of libtorch on the CPU: sums are bit-identical only for the same number.
    pub n_threads: usize,
    /// Where the steps were computed; not known of version 1 and of imported weights.
    #[serde(default)]
    pub device_type: Option<DeviceType>,
    /// Where the sampler stands in the training text.
    pub sampler: SamplerState,
    /// The tokenizer.
    pub tokenizer: Fingerprint,
}

/// A kind of device: each sums in an order of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceType {
    /// The CPU.
    Cpu,
    /// A CUDA device.
    Cuda,
}

impl From<Device> for DeviceType {
    fn from(device: Device) -> Self {
        if device.is_cuda() { Self::Cuda } else { Self::Cpu }
    }
}

impl Display for DeviceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "the CPU",
            Self::Cuda => "a GPU",
        })
    }
}

/// The whole of `state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`] of the build that wrote it.
    pub version: u32,
    /// Where the run stood.
    pub progress: Progress,
    /// The checkpoint's other files, by name.
    pub files: BTreeMap<String, FileEntry>,
}

/// What a file of the checkpoint must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its size.
    pub bytes: u64,
    /// Its 128-bit xxh3 hash as 32 hexadecimal digits.
    pub xxh3: String,
}

impl State {
    /// Reads the text of a `state.json`.
    pub(super) fn parse(text: &str) -> Result<Self, CheckpointProblem> {
        let broken = |error: serde_json::Error| CheckpointProblem::State(error.to_string());
        let value: serde_json::Value = serde_json::from_str(text).map_err(broken)?;
        if value.get("format").and_then(|format| format.as_str()) != Some(FORMAT) {
            return Err(CheckpointProblem::Foreign(format!("its state.json does not say \"format\": \"{FORMAT}\"")));
        }
        // The version is judged before the fields, which a later version may have changed.
        match value.get("version").and_then(serde_json::Value::as_u64) {
            Some(version) if version > u64::from(VERSION) => Err(CheckpointProblem::Version { found: version }),
            Some(_) => serde_json::from_value(value).map_err(broken),
            None => Err(CheckpointProblem::State("it has no \"version\"".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_foreign_files_are_told_apart() {
        let parse = |text: &str| State::parse(text).unwrap_err().to_string();
        assert!(parse("{\"format\": \"flowhn-check").contains("damaged"));
        assert!(parse("{\"epoch\": 3}").contains("not a FlowHN checkpoint"));
        assert!(parse("[]").contains("not a FlowHN checkpoint"));
        let future = parse("{\"format\": \"flowhn-checkpoint\", \"version\": 99, \"soul\": 1}");
        assert!(future.contains("99") && future.contains("newer"), "{future}");
        assert!(parse("{\"format\": \"flowhn-checkpoint\", \"version\": 1}").contains("progress"));
    }

    #[test]
    fn a_checkpoint_of_version_1_does_not_tell_its_device() {
        let text = r#"{"format": "flowhn-checkpoint", "version": 1, "files": {}, "progress": {"step": 3, "tokens": 96,
            "elapsed_s": 0.5, "n_threads": 2, "tokenizer": "00000000000000000000000000000000", "sampler": {"seed": 0, "epoch": 0,
            "index": 3, "n_windows": 9, "seq_len": 16, "data": "00000000000000000000000000000000"}}}"#;
        assert_eq!(State::parse(text).unwrap().progress.device_type, None);
        let newer =
            text.replace("\"tokens\"", "\"device_type\": \"cuda\", \"tokens\"").replace("1, \"files\"", "2, \"files\"");
        assert_eq!(State::parse(&newer).unwrap().progress.device_type, Some(DeviceType::Cuda));
    }
}
