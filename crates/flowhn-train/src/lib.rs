#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod batch;
pub mod bench;
pub mod checkpoint;
pub mod config;
pub mod data;
mod error;
pub mod estimate;
pub mod eval;
pub mod generate;
mod golden;
pub mod hf;
mod kernels;
pub mod metrics;
pub mod observe;
pub mod optim;
pub mod peak;
pub mod plot;
pub mod run_dir;
pub mod schedule;
#[cfg(feature = "selftest")]
pub mod selftest;
mod step;
pub mod storage;
mod summary;
pub mod tasks;
mod trained;
mod trainer;

pub use config::RunConfig;
pub use error::{Error, Result};
pub use golden::{MAX_REL_STEP, check_golden_step};
pub use kernels::KERNELS;
pub use summary::Summary;
pub use trained::Trained;
pub use trainer::{Outcome, TrainOptions, Trainer};
