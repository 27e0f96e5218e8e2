#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod block;
mod branch;
pub mod config;
mod decode;
mod error;
mod golden;
pub mod hf;
mod init;
mod layout;
mod mixer;
mod model;
mod names;
mod recompute;
mod score;
#[cfg(feature = "selftest")]
pub mod selftest;
mod steps;
mod weights;

pub use config::ModelConfig;
pub use decode::Decoder;
pub use error::{Error, Result};
pub use flowhn_nn::Fp8Projections;
pub use golden::{GoldenReport, MAX_REL_GRAD, MAX_REL_OUTPUT, check_golden};
pub use model::{Branches, IGNORE_INDEX, Input, Linears, Model, Output, parts};
pub use names::{Family, Fold, ForeignName};
pub use recompute::RecomputeEvery;
pub use score::{Target, TargetScores};
pub use steps::StepLaunch;
pub use weights::WeightFile;
