//! A corpus, a tokenizer and a tiny run in a temporary directory.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::data::{ReadOptions, train_tokenizer};
use crate::observe::StopFlag;
use crate::run_dir::{METRICS, VALIDATION};
use crate::{Outcome, Result, RunConfig, TrainOptions, Trainer};

/// Text, vocabulary and runs; removed when dropped.
#[derive(Debug)]
pub struct Small {
    dir: TempDir,
}

impl Small {
    /// Writes the text and counts the vocabulary.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn new() -> Result<Self> {
        let small = Self { dir: tempfile::tempdir().map_err(io)? };
        fs::write(small.path("train.jsonl"), documents(0, 160)).map_err(io)?;
        fs::write(small.path("valid.jsonl"), documents(160, 176)).map_err(io)?;
        let text = [small.path("train.jsonl")];
        train_tokenizer(&text, 300, &small.path("tokenizer.json"), &ReadOptions::default())?;
        Ok(small)
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A run called `name` of 40 steps, with overrides.
    ///
    /// # Errors
    /// Those of [`RunConfig::load`].
    pub fn config(&self, name: &str, sets: &[&str]) -> Result<RunConfig> {
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
        fs::write(&file, text).map_err(io)?;
        let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
        RunConfig::load(&file, &sets)
    }
}

/// Lines of made-up, regular text that a small model learns from at once.
fn documents(start: usize, end: usize) -> String {
    let (who, what) = (["the fox", "a crow", "one owl", "my cat"], ["sees", "hears", "follows"]);
    (start..end).fold(String::new(), |mut out, i| {
        let text: Vec<String> = (0..6)
            .map(|j| format!("{} {} number {}.", who[(i + j) % 4], what[(i * j) % 3], (i * 7 + j) % 10))
            .collect();
        let _ = writeln!(out, "{{\"text\": \"{}\"}}", text.join(" "));
        out
    })
}

/// Runs a sitting to its end.
///
/// # Errors
/// Those of [`Trainer::new`] and [`Trainer::run`].
pub fn sit(config: &RunConfig, options: &TrainOptions) -> Result<(Trainer, Outcome)> {
    let mut trainer = Trainer::new(config, options, &mut ())?;
    let outcome = trainer.run(&mut (), &StopFlag::default())?;
    Ok((trainer, outcome))
}

/// What has to be equal of two runs: weights and optimiser state as bits, and both logs without times.
#[derive(Debug)]
pub struct Ending {
    /// Names and bits of the tensors.
    pub tensors: Vec<(String, Vec<u32>)>,
    /// The lines of the log of steps.
    pub metrics: Vec<String>,
    /// The lines of the log of validations.
    pub validations: Vec<String>,
}

impl Ending {
    /// That of a run as it is now.
    ///
    /// # Errors
    /// If a log cannot be read.
    pub fn of(trainer: &Trainer) -> Result<Self> {
        let log = |name: &str| lines(&trainer.run_dir().join(name));
        Ok(Self { tensors: bits(trainer)?, metrics: log(METRICS)?, validations: log(VALIDATION)? })
    }

    /// The name of the first thing that is not equal.
    pub fn difference(&self, want: &Self) -> Option<String> {
        let tensor = self.tensors.iter().zip(&want.tensors).find(|(got, want)| got != want);
        match () {
            _ if self.metrics != want.metrics => Some(METRICS.to_owned()),
            _ if self.validations != want.validations => Some(VALIDATION.to_owned()),
            _ if self.tensors.len() != want.tensors.len() => Some("the number of tensors".to_owned()),
            _ => tensor.map(|((name, _), _)| name.clone()),
        }
    }
}

/// Parameters and optimiser state, as bits.
///
/// # Errors
/// If a tensor cannot be read.
pub fn bits(trainer: &Trainer) -> Result<Vec<(String, Vec<u32>)>> {
    let params = trainer.model().params().iter().map(|p| (p.name.clone(), p.weight.master().detach()));
    params.chain(trainer.optimizer_state()).map(|(name, tensor)| Ok((name, tensor_bits(&tensor)?))).collect()
}

/// The bits of a tensor as f32, which holds the values of bf16 and bytes as they are.
///
/// # Errors
/// If the tensor cannot be read.
pub fn tensor_bits(tensor: &Tensor) -> Result<Vec<u32>> {
    let flat = tensor.to_device(Device::Cpu).to_kind(Kind::Float).contiguous().view(-1);
    let values: Vec<f32> = flat.try_into().map_err(flowhn_torch::Error::from)?;
    Ok(values.into_iter().map(f32::to_bits).collect())
}

/// The lines of a log without the fields that tell times and memory.
///
/// # Errors
/// If the log cannot be read.
pub fn lines(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).map_err(io)?;
    let without_times = |line: &str| -> Result<String> {
        let mut record: serde_json::Value = serde_json::from_str(line).map_err(|error| io(error.into()))?;
        if let Some(object) = record.as_object_mut() {
            for key in ["tokens_per_s", "mfu", "max_memory_bytes", "elapsed_s"] {
                object.remove(key);
            }
        }
        Ok(record.to_string())
    };
    text.lines().map(without_times).collect()
}

fn io(error: std::io::Error) -> crate::Error {
    flowhn_torch::Error::invalid("small run", error.to_string()).into()
}
