//! `state.json`: where a run stood, and what the other files of the checkpoint must be.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::CheckpointProblem;
use crate::data::{Fingerprint, SamplerState};

/// What `state.json` says it is.
pub const FORMAT: &str = "flowhn-checkpoint";

/// The version that this build writes; it reads every version up to it.
pub const VERSION: u32 = 1;

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
    /// Where the sampler stands in the training text.
    pub sampler: SamplerState,
    /// The tokenizer.
    pub tokenizer: Fingerprint,
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
}
