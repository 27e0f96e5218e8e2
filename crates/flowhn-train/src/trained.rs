//! A trained model as commands use it: out of a checkpoint, with its tokenizer.

use std::path::{Path, PathBuf};

use flowhn_model::Model;
use tch::Device;

use crate::checkpoint::{Checkpoint, resolve};
use crate::config::{Dtype, RunConfig};
use crate::data::Tokenizer;
use crate::run_dir;
use crate::{Error, Result};

/// A model with everything that evaluation and generation need.
#[derive(Debug)]
pub struct Trained {
    /// The model, with the checkpoint's weights.
    pub model: Model,
    /// The tokenizer it was trained with.
    pub tokenizer: Tokenizer,
    /// The configuration of its run.
    pub config: RunConfig,
    /// Where the weights come from.
    pub checkpoint: Checkpoint,
    /// Newer checkpoints that were not usable, each with its reason.
    pub skipped: Vec<Error>,
}

impl Trained {
    /// Loads a checkpoint, or the newest usable one of a run's directory, to compute in `dtype`, or in the type it was
    /// trained in.
    ///
    /// The tokenizer is `tokenizer` where given, else the copy in the run's directory, else the file that the run named; it
    /// must be the one that the checkpoint was made with.
    ///
    /// # Errors
    /// [`Error::NoCheckpoint`], [`Error::Checkpoint`], [`Error::Data`] for the tokenizer, [`Error::Model`].
    pub fn load(path: &Path, tokenizer: Option<&Path>, device: Device, dtype: Option<Dtype>) -> Result<Self> {
        let latest = resolve(path)?;
        let checkpoint =
            latest.checkpoint.ok_or_else(|| Error::NoCheckpoint { path: path.to_owned(), skipped: String::new() })?;
        let config = checkpoint.config()?;
        let tokenizer = Tokenizer::load(&tokenizer_path(tokenizer, &checkpoint, &config))?;
        let whose = format!("checkpoint {}", checkpoint.path().display());
        tokenizer.check_fingerprint(checkpoint.progress().tokenizer, &whose)?;
        let mut model = Model::new(&config.model, device, config.train.seed)?;
        model.set_compute_kind(dtype.unwrap_or(config.train.dtype).kind());
        checkpoint.load_into(model.params())?;
        Ok(Self { model, tokenizer, config, checkpoint, skipped: latest.skipped })
    }
}

fn tokenizer_path(given: Option<&Path>, checkpoint: &Checkpoint, config: &RunConfig) -> PathBuf {
    // runs/NAME/checkpoints/step-N
    let copy = checkpoint.path().ancestors().nth(2).map(|run| run.join(run_dir::TOKENIZER));
    match (given, copy) {
        (Some(given), _) => given.to_owned(),
        (None, Some(copy)) if copy.is_file() => copy,
        _ => config.data.tokenizer.clone(),
    }
}
