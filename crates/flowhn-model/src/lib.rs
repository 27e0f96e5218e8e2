//! FlowHN models.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod config;
mod error;

pub use config::ModelConfig;
pub use error::{Error, Result};
