//! Reading checkpoints, and finding the one to read.

use std::path::{Path, PathBuf};

use flowhn_torch::MappedFile;
use tch::Tensor;
use xxhash_rust::xxh3::xxh3_128;

use super::state::{FileEntry, Progress, State};
use super::{CONFIG_FILE, CheckpointProblem, MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, list, tensors};
use crate::config::RunConfig;
use crate::{Error, Result};

/// A checkpoint whose files have been found whole.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    state: State,
    config: toml::Table,
}

impl Checkpoint {
    /// Opens a checkpoint's directory and checks the size and hash of every file in it.
    ///
    /// # Errors
    /// [`Error::Checkpoint`], which says what is wrong with it.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |problem| Error::checkpoint(path, problem);
        let state = read_state(path).map_err(fail)?;
        for name in [MODEL_FILE, OPTIMIZER_FILE, CONFIG_FILE] {
            if !state.files.contains_key(name) {
                return Err(fail(CheckpointProblem::State(format!("it does not list {name}"))));
            }
        }
        state.files.iter().try_for_each(|(name, entry)| check_file(path, name, entry)).map_err(fail)?;
        let text =
            std::fs::read_to_string(path.join(CONFIG_FILE)).map_err(Error::io(path, "read the config.toml of"))?;
        let config = text.parse::<toml::Table>().map_err(|error| fail(CheckpointProblem::State(error.to_string())))?;
        Ok(Self { path: path.to_owned(), state, config })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the run stood.
    pub fn progress(&self) -> &Progress {
        &self.state.progress
    }

    /// The hash of its weights' file, which tells them from all others.
    pub fn weights_hash(&self) -> &str {
        self.state.files.get(MODEL_FILE).map_or("", |entry| &entry.xxh3)
    }

    /// The configuration that it was trained with.
    ///
    /// # Errors
    /// As [`RunConfig::from_table`]: only for a configuration that this build refuses.
    pub fn config(&self) -> Result<RunConfig> {
        RunConfig::from_table(self.config.clone())
    }

    /// The parameters by name, on the host.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the file is no safetensors file.
    pub fn model(&self) -> Result<Vec<(String, Tensor)>> {
        self.tensors(MODEL_FILE)
    }

    /// The optimiser's state by name, on the host.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the file is no safetensors file.
    pub fn optimizer(&self) -> Result<Vec<(String, Tensor)>> {
        self.tensors(OPTIMIZER_FILE)
    }

    /// Overwrites the parameters of a model with those saved.
    ///
    /// # Errors
    /// [`Error::Checkpoint`], naming a parameter that is missing, unknown or of another shape.
    pub fn load_into(&self, params: &flowhn_nn::Params) -> Result<()> {
        let saved = self.model()?;
        let fail = |message| Error::checkpoint(&self.path, CheckpointProblem::Tensors { file: MODEL_FILE, message });
        if let Some(param) = params.iter().find(|param| !saved.iter().any(|(name, _)| *name == param.name)) {
            return Err(fail(format!("it has no parameter {}", param.name)));
        }
        saved.iter().try_for_each(|(name, values)| params.assign(name, values).map_err(|error| fail(error.to_string())))
    }

    /// Checks that a run with configuration `current` may go on from here: every key that steers the training has the value
    /// it had. See [`RunConfig::first_difference`] for the keys that may change.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the first key that differs and both values.
    pub fn check_config(&self, current: &RunConfig) -> Result<()> {
        match current.first_difference(&self.config)? {
            None => Ok(()),
            Some((key, stored, current)) => {
                Err(Error::checkpoint(&self.path, CheckpointProblem::OtherConfig { key, stored, current }))
            }
        }
    }

    fn tensors(&self, file: &'static str) -> Result<Vec<(String, Tensor)>> {
        let bytes = MappedFile::open(&self.path.join(file))?;
        tensors::read(&bytes)
            .map_err(|message| Error::checkpoint(&self.path, CheckpointProblem::Tensors { file, message }))
    }
}

/// The newest checkpoint that can be used, and the newer ones that cannot.
#[derive(Debug)]
pub struct Latest {
    /// The checkpoint; `None` where there is none at all.
    pub checkpoint: Option<Checkpoint>,
    /// Newer ones, newest first, each with its [`Error::Checkpoint`].
    pub skipped: Vec<Error>,
}

/// Walks from the newest checkpoint in `dir` to the oldest until one opens.
///
/// # Errors
/// [`Error::Io`] where the directory cannot be read; [`Error::NoCheckpoint`] where there are checkpoints and none of them
/// opens.
pub fn latest_valid(dir: &Path) -> Result<Latest> {
    let mut skipped = Vec::new();
    for (_, path) in list(dir)?.into_iter().rev() {
        match Checkpoint::open(&path) {
            Ok(checkpoint) => return Ok(Latest { checkpoint: Some(checkpoint), skipped }),
            Err(error) => skipped.push(error),
        }
    }
    if skipped.is_empty() {
        return Ok(Latest { checkpoint: None, skipped });
    }
    let reasons: Vec<String> = skipped.iter().map(Error::to_string).collect();
    Err(Error::NoCheckpoint { path: dir.to_owned(), skipped: format!(": {}", reasons.join("; ")) })
}

/// The checkpoint that a user means by `path`: a checkpoint, a `checkpoints` directory, or a run's directory; in the last
/// two the newest that can be used.
///
/// # Errors
/// [`Error::NoCheckpoint`] or [`Error::Checkpoint`].
pub fn resolve(path: &Path) -> Result<Latest> {
    if path.join(STATE_FILE).exists() || path.join(MODEL_FILE).exists() {
        return Ok(Latest { checkpoint: Some(Checkpoint::open(path)?), skipped: Vec::new() });
    }
    if path.is_file() {
        let what = "it is a file; name the directory that holds state.json".to_owned();
        return Err(Error::checkpoint(path, CheckpointProblem::Foreign(what)));
    }
    let inner = path.join(crate::run_dir::CHECKPOINTS);
    let latest = latest_valid(if inner.is_dir() { &inner } else { path })?;
    match latest.checkpoint {
        Some(_) => Ok(latest),
        None => Err(Error::NoCheckpoint { path: path.to_owned(), skipped: String::new() }),
    }
}

fn read_state(path: &Path) -> std::result::Result<State, CheckpointProblem> {
    match std::fs::read_to_string(path.join(STATE_FILE)) {
        Ok(text) => State::parse(&text),
        // The checkpoint's own files say that it was ours.
        Err(_) if path.join(MODEL_FILE).exists() => Err(CheckpointProblem::Missing(STATE_FILE.to_owned())),
        Err(error) => Err(CheckpointProblem::Foreign(format!("no readable {STATE_FILE} in it ({error})"))),
    }
}

fn check_file(path: &Path, name: &str, entry: &FileEntry) -> std::result::Result<(), CheckpointProblem> {
    let file = path.join(name);
    let found = std::fs::metadata(&file).map_err(|_| CheckpointProblem::Missing(name.to_owned()))?.len();
    if found != entry.bytes {
        return Err(CheckpointProblem::Size { file: name.to_owned(), found, expected: entry.bytes });
    }
    let bytes = MappedFile::open(&file).map_err(|_| CheckpointProblem::Missing(name.to_owned()))?;
    if format!("{:032x}", xxh3_128(&bytes)) != entry.xxh3 {
        return Err(CheckpointProblem::Hash { file: name.to_owned() });
    }
    Ok(())
}
