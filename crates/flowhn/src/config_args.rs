//! `--config` and `--set`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use flowhn_train::run_dir::CONFIG;
use flowhn_train::{Error, RunConfig};

/// A configuration file with overrides.
#[derive(Debug, clap::Args)]
pub struct ConfigArgs {
    /// The configuration of the run, a TOML file
    #[arg(long, short, value_name = "FILE")]
    pub config: PathBuf,
    #[command(flatten)]
    pub sets: SetArgs,
}

/// Overrides of a configuration.
#[derive(Debug, clap::Args)]
pub struct SetArgs {
    /// Override a key, as in --set train.steps=100; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

impl ConfigArgs {
    /// The checked configuration.
    ///
    /// # Errors
    /// As [`load`].
    pub fn load(&self) -> Result<RunConfig> {
        load(&self.config, &self.sets.sets)
    }
}

/// Reads and checks a configuration; what is wrong inside it is told with the file's name.
///
/// # Errors
/// Those of [`RunConfig::load`].
pub fn load(path: &Path, sets: &[String]) -> Result<RunConfig> {
    use flowhn_model::Error as ModelError;
    RunConfig::load(path, sets).map_err(|error| match &error {
        Error::Model(ModelError::Read { .. } | ModelError::Toml { .. } | ModelError::Override { .. }) => error.into(),
        _ => anyhow::Error::from(error).context(path.display().to_string()),
    })
}

/// The checked configuration of a run's own directory.
///
/// # Errors
/// [`Error::NothingToResume`], or as [`load`].
pub fn load_of_run(dir: &Path, sets: &[String]) -> Result<RunConfig> {
    let path = dir.join(CONFIG);
    if !path.exists() {
        // The error that resuming such a directory brings.
        return Err(Error::NothingToResume { path: dir.to_owned() }.into());
    }
    load(&path, sets)
}
