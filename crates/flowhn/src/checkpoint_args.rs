//! `--checkpoint`: a trained model with its tokenizer.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use flowhn_model::Model;
use flowhn_train::RunConfig;
use flowhn_train::checkpoint::{self, Checkpoint};
use flowhn_train::data::Tokenizer;
use flowhn_train::run_dir::TOKENIZER;
use tch::Device;

use crate::console::Console;
use crate::device::DeviceArgs;

/// What names a trained model.
#[derive(Debug, clap::Args)]
pub struct CheckpointArgs {
    /// A run's directory, its checkpoints directory, or one step-N in there
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// The tokenizer, where it is no longer beside the checkpoint
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
}

/// A model as it was trained.
pub struct Trained {
    /// Where it comes from.
    pub checkpoint: Checkpoint,
    /// How it was trained.
    pub config: RunConfig,
    /// The model with the checkpoint's weights.
    pub model: Model,
    /// The tokenizer it was trained with.
    pub tokenizer: Tokenizer,
}

impl CheckpointArgs {
    /// Loads the newest undamaged checkpoint that is meant; damaged ones are warned of.
    ///
    /// # Errors
    /// Where there is none, or the tokenizer at hand is another than the model's.
    pub fn load(&self, console: &Console) -> Result<Trained> {
        load(&self.checkpoint, self.tokenizer.as_deref(), self.device.device()?, console)
    }
}

/// Loads the newest undamaged checkpoint that `path` means; damaged ones are warned of.
///
/// # Errors
/// As [`CheckpointArgs::load`].
pub fn load(path: &Path, tokenizer: Option<&Path>, device: Device, console: &Console) -> Result<Trained> {
    let latest = checkpoint::resolve(path)?;
    for skipped in &latest.skipped {
        console.warn(format_args!("{skipped}"));
    }
    let checkpoint = latest.checkpoint.ok_or_else(|| anyhow!("{}: no usable checkpoint", path.display()))?;
    let config = checkpoint.config().with_context(|| format!("checkpoint {}", checkpoint.path().display()))?;

    let path = tokenizer.map_or_else(|| tokenizer_of(&checkpoint, &config), Path::to_owned);
    let tokenizer = Tokenizer::load(&path)
        .with_context(|| "the checkpoint's tokenizer is needed; name it with --tokenizer FILE".to_owned())?;
    let whose = format!("checkpoint {}", checkpoint.path().display());
    tokenizer.check_fingerprint(checkpoint.progress().tokenizer, &whose)?;

    let mut model = Model::new(&config.model, device, config.train.seed)?;
    model.set_compute_kind(config.train.dtype.kind());
    checkpoint.load_into(model.params())?;
    Ok(Trained { checkpoint, config, model, tokenizer })
}

/// The copy in the run's directory, or else the file that the run was started with.
fn tokenizer_of(checkpoint: &Checkpoint, config: &RunConfig) -> PathBuf {
    // The path may be `.` or `step-5`, whose parents only the full path tells.
    let full = checkpoint.path().canonicalize().unwrap_or_else(|_| checkpoint.path().to_owned());
    let run = full.parent().and_then(Path::parent);
    match run.map(|run| run.join(TOKENIZER)).filter(|copy| copy.exists()) {
        Some(copy) => copy,
        None => config.data.tokenizer.clone(),
    }
}
