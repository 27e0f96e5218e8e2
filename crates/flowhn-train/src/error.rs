//! The error of training.

use std::path::{Path, PathBuf};

use crate::checkpoint::CheckpointProblem;
use crate::data;
use crate::storage::Storage;

/// Result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in a run; each message names the thing at fault and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading, tokenising or batching text.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// A tensor operation.
    #[error(transparent)]
    Tensor(#[from] flowhn_torch::Error),
    /// The configuration file, or the model in it.
    #[error(transparent)]
    Model(#[from] flowhn_model::Error),
    /// A value in the configuration that cannot work.
    #[error("{key} = {value}: {want}")]
    Setting {
        /// The key, dotted.
        key: &'static str,
        /// The value as written.
        value: String,
        /// What would work.
        want: String,
    },
    /// The operating system refused.
    #[error("{path}: cannot {action}: {source}", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried, for example "write".
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The disk filled up.
    #[error(
        "{path}: the disk is full: {needed_bytes} bytes needed, {free_bytes} free; free some space, lower \
         train.keep_last or move run.dir to another disk, then resume (earlier checkpoints are untouched)",
        path = path.display()
    )]
    DiskFull {
        /// The file that did not fit.
        path: PathBuf,
        /// Bytes that the whole write needs.
        needed_bytes: u64,
        /// Bytes that are free.
        free_bytes: u64,
    },
    /// The run directory cannot be made or written.
    #[error("run.dir {path}: cannot be written: {source}; choose another directory with run.dir", path = path.display())]
    RunDirUnwritable {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The directory holds a run already.
    #[error(
        "run.dir {path} already holds a run; continue it with --resume, or choose another directory with run.dir",
        path = path.display()
    )]
    RunExists {
        /// The directory.
        path: PathBuf,
    },
    /// A resume without a run.
    #[error("run.dir {path} holds no run to resume; start it without --resume", path = path.display())]
    NothingToResume {
        /// The directory.
        path: PathBuf,
    },
    /// Another process works in the directory.
    #[error(
        "run.dir {path} is in use by {holder}; wait for it, stop it, or choose another directory with run.dir",
        path = path.display()
    )]
    RunLocked {
        /// The directory.
        path: PathBuf,
        /// Process and host that hold it, as far as known.
        holder: String,
    },
    /// A checkpoint that cannot be used.
    #[error("checkpoint {path}: {problem}", path = path.display())]
    Checkpoint {
        /// The checkpoint's directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: Box<CheckpointProblem>,
    },
    /// No checkpoint where one was looked for.
    #[error("{path}: no usable checkpoint{skipped}", path = path.display())]
    NoCheckpoint {
        /// Where it was looked for.
        path: PathBuf,
        /// What was found and why it was not used; empty or starting with a colon.
        skipped: String,
    },
    /// The device has too little memory for a step.
    #[error(
        "step {step}, with {batch_size} sequences of {seq_len} tokens at a time: {message} Lower train.batch_size (train.grad_accum \
         makes up for it at the same step size), train.logits_mib or model.seq_len, set train.recompute_every = 1 or train.optim_state = \"int8\", \
         or give the run a device of its own"
    )]
    OutOfMemory {
        /// The step, from 1.
        step: u64,
        /// Sequences of a micro-batch.
        batch_size: usize,
        /// Tokens of a sequence.
        seq_len: usize,
        /// What libtorch said: how much was asked for and how much is free.
        message: String,
    },
    /// The loss, the gradient or the weights are not numbers any more.
    #[error(
        "step {step}: {what} (loss {loss}, gradient norm {grad_norm}): training has diverged and stopped before such \
         weights were saved; the batch: {provenance}; last good checkpoint: {last_good}; lower train.lr or \
         train.clip_norm, lengthen train.warmup_frac, or look at that text",
        last_good = last_good.as_deref().map_or("none".to_owned(), |path| path.display().to_string())
    )]
    NonFinite {
        /// The step, from 1.
        step: u64,
        /// What is not finite.
        what: &'static str,
        /// Its loss.
        loss: f32,
        /// The norm of its gradient.
        grad_norm: f32,
        /// The text that the step read.
        provenance: String,
        /// The newest checkpoint, whose weights are finite.
        last_good: Option<PathBuf>,
    },
    /// A file of evaluation items that cannot be used.
    #[error("{path}: {at}{message}", path = path.display(), at = if *line > 0 { format!("line {line}: ") } else { String::new() })]
    Item {
        /// The file.
        path: PathBuf,
        /// The line, from 1; 0 for the file as a whole.
        line: u64,
        /// What is wrong.
        message: String,
    },
    /// An evaluation task that is not there.
    #[error(
        "there is no task `{name}` in {dir} (it holds: {known}); name a file of items (.jsonl, .jsonl.gz, .jsonl.zst), or another \
         folder with --eval-data",
        dir = dir.display(), known = if known.is_empty() { "none" } else { known }
    )]
    NoTask {
        /// What was asked for.
        name: String,
        /// Where it was looked for.
        dir: PathBuf,
        /// The tasks that are there.
        known: String,
    },
    /// The loss plot could not be drawn.
    #[error("{path}: cannot draw the plot: {message}", path = path.display())]
    Plot {
        /// The file.
        path: PathBuf,
        /// What the plotting library said.
        message: String,
    },
    /// A line of a metrics file that is not ours.
    #[error("{path}: line {line}: {message}; move the file away to start a new log", path = path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        message: String,
    },
}

impl Error {
    /// An adaptor for `map_err`: an I/O error with its path and what was tried.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { path, action, source }
    }

    /// A failed write of `path`, as part of a write of `needed_bytes`: a full disk is told apart from the rest.
    pub(crate) fn writing(storage: &dyn Storage, path: &Path, needed_bytes: u64, source: std::io::Error) -> Error {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull, WriteZero};
        match source.kind() {
            StorageFull | QuotaExceeded | WriteZero => Error::DiskFull {
                path: path.to_owned(),
                needed_bytes,
                free_bytes: storage.available_bytes(path.parent().unwrap_or(path)).unwrap_or(0),
            },
            _ => Error::Io { path: path.to_owned(), action: "write", source },
        }
    }

    /// What libtorch said, if a tensor did not fit into the memory of its device.
    pub(crate) fn out_of_memory(&self) -> Option<&str> {
        match self {
            Error::Tensor(flowhn_torch::Error::OutOfMemory(message))
            | Error::Model(flowhn_model::Error::Tensor(flowhn_torch::Error::OutOfMemory(message))) => Some(message),
            _ => None,
        }
    }

    /// A setting whose value cannot work.
    pub(crate) fn setting(key: &'static str, value: impl ToString, want: impl Into<String>) -> Error {
        Error::Setting { key, value: value.to_string(), want: want.into() }
    }

    pub(crate) fn checkpoint(path: &Path, problem: CheckpointProblem) -> Error {
        Error::Checkpoint { path: path.to_owned(), problem: Box::new(problem) }
    }
}
