//! The error of models and their configurations.

use std::path::PathBuf;

/// Result of an operation on models and configurations.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong with a model or its configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not TOML.
    #[error("{path} is not valid TOML: {message}", path = path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// Line, column and cause.
        message: String,
    },
    /// A key that no configuration has.
    #[error("unknown key `{key}`{hint}")]
    UnknownKey {
        /// The full key.
        key: String,
        /// The nearest valid key, or all of them.
        hint: String,
    },
    /// A value that a key cannot have.
    #[error("`{key}`: {message}")]
    Value {
        /// The full key.
        key: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// An override that is not `key=value`.
    #[error("cannot apply the override `{set}`: {message}")]
    Override {
        /// The override as given.
        set: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// Shapes, policies or settings of the split that do not fit together.
    #[error(transparent)]
    Split(#[from] flowhn_split::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] flowhn_torch::Error),
    /// A file of weights or golden vectors is not what it should be.
    #[error("{path}: {message}", path = path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// Input that the model cannot take.
    #[error("{0}")]
    Input(String),
}

impl Error {
    pub(crate) fn value(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Value { key: key.into(), message: message.into() }
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Tensor(error.into())
    }
}
