//! A corpus, a tokenizer and a tiny run in a temporary directory.
#![allow(dead_code)]

pub mod storage;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use flowhn_train::data::{ReadOptions, train_tokenizer};
use flowhn_train::observe::StopFlag;
use flowhn_train::run_dir::Start;
use flowhn_train::{Outcome, RunConfig, TrainOptions, Trainer};
use tch::Tensor;
use tempfile::TempDir;

/// What tests write to and read from; removed when dropped.
pub struct Bench {
    pub dir: TempDir,
}

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("train.jsonl"), documents(0, 160)).unwrap();
        std::fs::write(dir.path().join("valid.jsonl"), documents(160, 176)).unwrap();
        let text = [dir.path().join("train.jsonl")];
        train_tokenizer(&text, 300, &dir.path().join("tokenizer.json"), &ReadOptions::default()).unwrap();
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A run called `name`, with overrides.
    pub fn config(&self, name: &str, sets: &[&str]) -> RunConfig {
        let file = self.path(&format!("{name}.toml"));
        let dir = self.dir.path().display();
        let text = format!(
            r#"
            [model]
            vocab_size = 320
            d_model = 32
            d_ff = 48
            n_layers = 2
            seq_len = 48
            attn = {{ n_heads = 2, n_kv_heads = 1, rope = true }}
            ssm = {{ d_state = 4, d_inner = 40, dt_rank = 3 }}
            split = {{ policy = "cyclic_split", chunk_len = 8, first_blocks = ["ssm_all"] }}
            [data]
            train = ["{dir}/train.jsonl"]
            valid = ["{dir}/valid.jsonl"]
            tokenizer = "{dir}/tokenizer.json"
            cache_dir = "{dir}/cache"
            [train]
            steps = 40
            batch_size = 2
            grad_accum = 2
            lr = 5e-3
            eval_every = 15
            log_every = 7
            checkpoint_every = 10
            keep_last = 3
            [run]
            dir = "{dir}/runs/{name}"
            "#
        );
        std::fs::write(&file, text).unwrap();
        let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
        RunConfig::load(&file, &sets).unwrap()
    }
}

/// Lines of made-up, regular text that a small model learns from at once.
fn documents(start: usize, end: usize) -> String {
    let (who, what) = (["the fox", "a crow", "one owl", "my cat"], ["sees", "hears", "follows"]);
    (start..end).fold(String::new(), |mut out, i| {
        let text: Vec<String> = (0..6)
            .map(|j| format!("{} {} number {}.", who[(i + j) % 4], what[(i * j) % 3], (i * 7 + j) % 10))
            .collect();
        writeln!(out, "{{\"text\": \"{}\"}}", text.join(" ")).unwrap();
        out
    })
}

pub fn fresh() -> TrainOptions {
    TrainOptions::default()
}

pub fn resume() -> TrainOptions {
    TrainOptions { start: Start::Resume, ..TrainOptions::default() }
}

/// Runs a sitting to its end.
pub fn sit(config: &RunConfig, options: &TrainOptions) -> (Trainer, Outcome) {
    let mut trainer = Trainer::new(config, options, &mut ()).unwrap();
    let outcome = trainer.run(&mut (), &StopFlag::default()).unwrap();
    (trainer, outcome)
}

/// Parameters and optimiser state, as bits.
pub fn bits(trainer: &Trainer) -> Vec<(String, Vec<u32>)> {
    let params = trainer.model().params().iter().map(|p| (p.name.clone(), p.weight.master().detach()));
    params.chain(trainer.optimizer_state()).map(|(name, tensor)| (name, tensor_bits(&tensor))).collect()
}

pub fn tensor_bits(tensor: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = tensor.contiguous().view(-1).try_into().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// The lines of a log without the fields that tell times and memory.
pub fn lines(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| {
            let mut object: serde_json::Value = serde_json::from_str(line).unwrap();
            let object = object.as_object_mut().unwrap();
            for key in ["tokens_per_s", "mfu", "max_memory_bytes", "elapsed_s"] {
                object.remove(key);
            }
            serde_json::to_string(&object).unwrap()
        })
        .collect()
}
