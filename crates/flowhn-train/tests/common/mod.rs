//! A corpus, a tokenizer and a tiny run in a temporary directory.
#![allow(dead_code)]

pub mod storage;

use std::path::{Path, PathBuf};

use flowhn_train::run_dir::Start;
use flowhn_train::selftest::small::{self, Small};
use flowhn_train::{Outcome, RunConfig, TrainOptions, Trainer};
use tch::Tensor;

/// What tests write to and read from; removed when dropped.
pub struct Bench(Small);

impl Bench {
    pub fn new() -> Self {
        Self(Small::new().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }

    /// A run called `name`, with overrides.
    pub fn config(&self, name: &str, sets: &[&str]) -> RunConfig {
        self.0.config(name, sets).unwrap()
    }
}

pub fn fresh() -> TrainOptions {
    TrainOptions::default()
}

pub fn resume() -> TrainOptions {
    TrainOptions { start: Start::Resume, ..TrainOptions::default() }
}

/// Runs a sitting to its end.
pub fn sit(config: &RunConfig, options: &TrainOptions) -> (Trainer, Outcome) {
    small::sit(config, options).unwrap()
}

pub fn tensor_bits(tensor: &Tensor) -> Vec<u32> {
    small::tensor_bits(tensor).unwrap()
}

/// The lines of a log without the fields that tell times and memory.
pub fn lines(path: &Path) -> Vec<String> {
    small::lines(path).unwrap()
}
