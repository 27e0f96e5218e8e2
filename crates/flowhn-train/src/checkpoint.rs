//! Checkpoints: `checkpoints/step-N/` with `model.safetensors`, `optimizer.safetensors`, `config.toml` and `state.json`.
//!
//! A checkpoint is written under a hidden name and renamed when all of it is on the disk, so one that has its name is whole,
//! whenever the process was killed. What a disk or a copy does to it later shows in the sizes and hashes that `state.json`
//! records: [`Checkpoint::open`] checks them, and [`latest_valid`] falls back to the newest checkpoint that passes.

mod read;
mod state;
mod tensors;
mod write;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

pub use read::{Checkpoint, Latest, latest_valid, resolve};
pub use state::{DeviceType, FORMAT, FileEntry, Progress, State, VERSION};
pub(crate) use write::write_tensors;
pub use write::{Snapshot, prune, remove_stale, save};

use crate::{Error, Result};

/// The parameters, by the names that the model gives them.
pub const MODEL_FILE: &str = "model.safetensors";
/// The optimiser's state: `exp_avg.NAME`, `exp_avg_sq.NAME` and `step`; in fp8 also [`FP8_SCALES`].
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// In the optimiser's file, what the scales of projections in fp8 follow from ([`flowhn_nn::Params::fp8_scales`]).
pub const FP8_SCALES: &str = "fp8_scales";
/// The checked configuration of the run.
pub const CONFIG_FILE: &str = "config.toml";
/// Where the run stood, and the sizes and hashes of the other files.
pub const STATE_FILE: &str = "state.json";

/// What can be wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointProblem {
    /// A file is not there.
    #[error("torn: {0} is missing; remove the checkpoint and use an earlier one")]
    Missing(String),
    /// A file has another size than it had when it was written.
    #[error("torn: {file} has {found} bytes, {expected} were written; remove the checkpoint and use an earlier one")]
    Size {
        /// The file.
        file: String,
        /// Its size.
        found: u64,
        /// The size it had.
        expected: u64,
    },
    /// A file has other contents than it had when it was written.
    #[error("damaged: {file} does not have the hash it was written with; remove the checkpoint and use an earlier one")]
    Hash {
        /// The file.
        file: String,
    },
    /// `state.json` is ours and cannot be read.
    #[error("state.json is damaged: {0}; remove the checkpoint and use an earlier one")]
    State(String),
    /// The directory or file is something else.
    #[error("not a FlowHN checkpoint: {0}")]
    Foreign(String),
    /// Written by a later version of this program.
    #[error("written by a newer FlowHN (format version {found}, this build reads up to {VERSION}); update FlowHN")]
    Version {
        /// The version in the file.
        found: u64,
    },
    /// The run that wants to go on has another configuration.
    #[error(
        "made with {key} = {stored}, this run has {current}; restore the value to resume, or start a new run with \
         another run.dir"
    )]
    OtherConfig {
        /// The first key that differs, dotted.
        key: String,
        /// Its value in the checkpoint.
        stored: String,
        /// Its value now.
        current: String,
    },
    /// A tensor is missing, unknown or of another shape.
    #[error("{file} does not fit the model: {message}")]
    Tensors {
        /// The file.
        file: &'static str,
        /// What does not fit.
        message: String,
    },
}

/// The directory of the checkpoint of `step`.
pub fn step_dir(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("step-{step}"))
}

/// The checkpoints in a directory, oldest first, by name alone; none where there is no such directory.
///
/// # Errors
/// [`Error::Io`] where the directory cannot be read.
pub fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        entries => entries.map_err(Error::io(dir, "read the directory"))?,
    };
    let mut steps = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io(dir, "read the directory"))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if let Some(step) = name.strip_prefix("step-").and_then(|step| step.parse().ok()) {
            steps.push((step, path));
        }
    }
    steps.sort_unstable();
    Ok(steps)
}
