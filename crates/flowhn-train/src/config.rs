//! The configuration of a run: one TOML file with the sections `[model]`, `[data]`, `[train]` and `[run]`.
//!
//! ```toml
//! [model]                      # see flowhn_model::ModelConfig
//! [data]
//! train = ["train.jsonl"]      # .jsonl, .jsonl.zst, .txt, .txt.zst, or .tokens
//! valid = ["valid.jsonl"]      # or valid_frac = 0.05: that share of the training documents
//! tokenizer = "tokenizer.json"
//! reset_documents = true       # conv, scan state and attention start anew at each document
//! cache_dir = "runs/.cache"    # token shards, built once
//! [train]
//! steps = 400                  # updates
//! batch_size = 8               # sequences of model.seq_len in a micro-batch
//! grad_accum = 1               # micro-batches in an update
//! dtype = "fp32"               # compute type; weights are fp32. "bf16" on GPUs that have it
//! linears = "dtype"            # "fp8" with dtype = "bf16": the blocks' projections multiply 8-bit floats, on GPUs that have them
//! deterministic = true         # on a GPU: equal runs give equal bits; false lets attention use kernels that do not where ours do not fit
//! cuda_graph = true            # on a GPU: the step is captured once and replayed; false launches its operators one by one
//! branches = "serial"          # "streams" on a GPU: attention runs on a stream of its own, beside the state-space branch
//! grads = "fp32"               # type of projections' gradients (and the head's, if its logits are one chunk) until the update; "bf16" with
//!                              # dtype = "bf16" takes 2 bytes an element, not 4
//! logits_mib = 512             # on a GPU: most memory for the head's logits at a time; 2048, the most, is up to a twentieth of the head faster
//! recompute_every = 0          # 1 computes every block's activations anew in the backward pass, 2 every second's; 0 keeps all
//! seed = 0                     # initial weights and the order of the text
//! lr = 1e-3                    # peak learning rate
//! min_lr_frac = 0.1            # last learning rate over the peak
//! schedule = "cosine"          # or "wsd", "constant"
//! warmup_frac = 0.1            # share of the steps
//! decay_frac = 0.2             # share of the steps, wsd only
//! beta1 = 0.9
//! beta2 = 0.95
//! eps = 1e-8
//! weight_decay = 0.1
//! clip_norm = 1.0              # 0 turns clipping off
//! optim_state = "fp32"         # type of AdamW's two means between updates; "bf16" and "int8" take 4 and 2 bytes a parameter, not 8
//! eval_every = 100             # steps; 0 validates only at the end
//! eval_batches = 0             # 0 takes the whole validation set
//! log_every = 10               # steps between readings of the device; every step is logged
//! checkpoint_every = 100       # steps; 0 saves only at the end
//! keep_last = 2                # checkpoints; 0 keeps all
//! sample_prompt = ""           # what the sample at the end continues
//! [run]
//! dir = "runs/tiny"            # default: runs/ and the name of the file
//! ```

use std::fmt;
use std::path::{Path, PathBuf};

use flowhn_model::config::{RawModel, from_table, load_table};
use flowhn_model::{Branches, Linears, ModelConfig, RecomputeEvery};
use serde::{Deserialize, Serialize};
use tch::Kind;
use toml::{Table, Value};

use crate::optim::{AdamWOptions, StateType};
use crate::schedule::{LearningRate, Schedule};
use crate::{Error, Result};

/// A whole run whose values fit together.
#[derive(Clone, Debug, PartialEq)]
pub struct RunConfig {
    /// The model.
    pub model: ModelConfig,
    /// The text.
    pub data: DataConfig,
    /// The training.
    pub train: TrainConfig,
    /// Where the run is kept.
    pub run: RunSection,
}

/// The `[data]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Training files.
    pub train: Vec<PathBuf>,
    /// Validation files; empty where `valid_frac` takes them from the training documents.
    pub valid: Vec<PathBuf>,
    /// Share of the training documents that validate instead, if no files are named.
    pub valid_frac: f64,
    /// The tokenizer's file.
    pub tokenizer: PathBuf,
    /// Whether documents in a pack are kept apart.
    pub reset_documents: bool,
    /// Where token shards are kept.
    pub cache_dir: PathBuf,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: Vec::new(),
            valid: Vec::new(),
            valid_frac: 0.,
            tokenizer: PathBuf::new(),
            reset_documents: true,
            cache_dir: PathBuf::from("runs/.cache"),
        }
    }
}

/// The type in which a step computes. Weights are fp32 in either; for gradients see `grads`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit floats.
    #[default]
    Fp32,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// libtorch's name of it.
    pub fn kind(self) -> Kind {
        match self {
            Dtype::Fp32 => Kind::Float,
            Dtype::Bf16 => Kind::BFloat16,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::Fp32 => "fp32",
            Dtype::Bf16 => "bf16",
        })
    }
}

/// The `[train]` section; the module tells what each key means.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Updates.
    pub steps: u64,
    /// Sequences in a micro-batch.
    pub batch_size: usize,
    /// Micro-batches in an update.
    pub grad_accum: usize,
    /// Compute type.
    pub dtype: Dtype,
    /// The type of the factors that the blocks' projections multiply.
    pub linears: Linears,
    /// Whether equal runs give equal bits on a GPU too. Our own kernels always do; libtorch's attention has faster ones that do not.
    pub deterministic: bool,
    /// Whether a step on a GPU is one CUDA graph.
    pub cuda_graph: bool,
    /// Whether a block's branches run one after the other or, on a GPU, beside each other.
    pub branches: Branches,
    /// The type of projections' gradients between the backward pass and the update, and of the head's where all logits are one chunk.
    pub grads: Dtype,
    /// The most memory that the head's logits take at a time on a GPU, MiB.
    pub logits_mib: u64,
    /// Which blocks' activations are not kept for the backward pass but computed anew.
    pub recompute_every: RecomputeEvery,
    /// Seed of initial weights and of the order of the text.
    pub seed: u64,
    /// Peak learning rate.
    pub lr: f64,
    /// Last learning rate over the peak.
    pub min_lr_frac: f64,
    /// Shape of the learning rate.
    pub schedule: Schedule,
    /// Share of the steps that warm up.
    pub warmup_frac: f64,
    /// Share of the steps that decay, in `wsd`.
    pub decay_frac: f64,
    /// Decay of AdamW's mean of gradients.
    pub beta1: f64,
    /// Decay of AdamW's mean of squares.
    pub beta2: f64,
    /// AdamW's epsilon.
    pub eps: f64,
    /// Decoupled weight decay of matrices and embeddings.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; 0 for any.
    pub clip_norm: f64,
    /// Type of AdamW's means between updates.
    pub optim_state: StateType,
    /// Steps between validations; 0 for one at the end.
    pub eval_every: u64,
    /// Batches of a validation; 0 for all.
    pub eval_batches: u64,
    /// Steps between readings of losses and norms from the device.
    pub log_every: u64,
    /// Steps between checkpoints; 0 for one at the end.
    pub checkpoint_every: u64,
    /// Checkpoints to keep; 0 for all.
    pub keep_last: usize,
    /// What the sample at the end continues.
    pub sample_prompt: String,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch_size: 8,
            grad_accum: 1,
            dtype: Dtype::Fp32,
            linears: Linears::Dtype,
            deterministic: true,
            cuda_graph: true,
            branches: Branches::Serial,
            grads: Dtype::Fp32,
            logits_mib: flowhn_nn::LOGITS_BYTES >> 20,
            recompute_every: RecomputeEvery(0),
            seed: 0,
            lr: 1e-3,
            min_lr_frac: 0.1,
            schedule: Schedule::Cosine,
            warmup_frac: 0.1,
            decay_frac: 0.2,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.,
            optim_state: StateType::Fp32,
            eval_every: 100,
            eval_batches: 0,
            log_every: 10,
            checkpoint_every: 100,
            keep_last: 2,
            sample_prompt: String::new(),
        }
    }
}

/// The `[run]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSection {
    /// The run's directory.
    pub dir: PathBuf,
}

/// The file as it is written. The model's section is read on its own, so that its errors name its keys.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRun {
    model: RawModel,
    #[serde(default)]
    data: DataConfig,
    #[serde(default)]
    train: TrainConfig,
    run: Option<RunSection>,
}

/// Keys that a resumed run may change: they move files, or say when things are shown and kept, and no weight depends on them.
/// The text behind `data.train` and the tokenizer are held to by their fingerprints instead.
const FREE_KEYS: [&str; 14] = [
    "data.train",
    "data.valid",
    "data.tokenizer",
    "data.cache_dir",
    "train.eval_every",
    "train.eval_batches",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.sample_prompt",
    "train.cuda_graph",
    "train.branches",
    "train.recompute_every",
    "run.dir",
];

impl RunConfig {
    /// Reads a file, applies overrides of the form `a.b=c`, and checks all of it.
    ///
    /// # Errors
    /// [`Error::Model`] for files, keys and the model; [`Error::Setting`] for a value that cannot work.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self> {
        let mut table = load_table(path, sets)?;
        if !table.contains_key("run") {
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            let run = Table::from_iter([("dir".to_owned(), Value::String(format!("runs/{name}")))]);
            table.insert("run".to_owned(), Value::Table(run));
        }
        Self::from_table(table)
    }

    /// Checks a table.
    ///
    /// # Errors
    /// As [`RunConfig::load`].
    pub fn from_table(table: Table) -> Result<Self> {
        let raw: RawRun = from_table(table)?;
        let config = Self {
            model: ModelConfig::check(raw.model)?,
            data: raw.data,
            train: raw.train,
            run: raw.run.unwrap_or_else(|| RunSection { dir: PathBuf::from("runs/run") }),
        };
        config.data.check()?;
        config.train.check()?;
        Ok(config)
    }

    /// The complete configuration as a table; [`RunConfig::from_table`] makes the same configuration of it.
    ///
    /// # Errors
    /// [`Error::Setting`] for a path that is not Unicode, which TOML cannot hold.
    pub fn to_table(&self) -> Result<Table> {
        #[derive(Serialize)]
        struct Whole<'a> {
            model: RawModel,
            data: &'a DataConfig,
            train: &'a TrainConfig,
            run: &'a RunSection,
        }
        let whole = Whole { model: self.model.to_raw(), data: &self.data, train: &self.train, run: &self.run };
        Table::try_from(whole).map_err(|error| Error::setting("config", "", error.to_string()))
    }

    /// The complete configuration as TOML text.
    ///
    /// # Errors
    /// As [`RunConfig::to_table`].
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(&self.to_table()?).map_err(|error| Error::setting("config", "", error.to_string()))
    }

    /// The first key that steers the training and has another value in `stored`, as `(key, stored, own)`. Where the text,
    /// the tokenizer and the run are kept may differ, and when things are logged, validated, saved and kept.
    ///
    /// # Errors
    /// As [`RunConfig::from_table`], where this build refuses `stored`.
    pub fn first_difference(&self, stored: &Table) -> Result<Option<(String, String, String)>> {
        // Through the checked form, so that keys which a newer build knows have their defaults.
        let (stored, own) = (flatten(Self::from_table(stored.clone())?.to_table()?), flatten(self.to_table()?));
        let absent = || "absent".to_owned();
        let value = |list: &[(String, String)], key: &str| list.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
        let keys = stored.iter().chain(&own).map(|(key, _)| key).filter(|key| !FREE_KEYS.contains(&key.as_str()));
        Ok(keys.into_iter().find_map(|key| {
            let (stored, own) = (value(&stored, key), value(&own, key));
            (stored != own).then(|| (key.clone(), stored.unwrap_or_else(absent), own.unwrap_or_else(absent)))
        }))
    }
}

impl DataConfig {
    fn check(&self) -> Result<()> {
        if !(0. ..1.).contains(&self.valid_frac) {
            return Err(Error::setting("data.valid_frac", self.valid_frac, "it must be at least 0 and below 1"));
        }
        if self.valid_frac > 0. && !self.valid.is_empty() {
            let want = "validation files are named in data.valid as well; drop one of the two";
            return Err(Error::setting("data.valid_frac", self.valid_frac, want));
        }
        Ok(())
    }

    /// Checks what training needs and other uses of a configuration, such as printing its plan, do not.
    pub(crate) fn check_for_training(&self) -> Result<()> {
        if self.train.is_empty() {
            return Err(Error::setting("data.train", "[]", "name at least one file of training text"));
        }
        if self.tokenizer.as_os_str().is_empty() {
            return Err(Error::setting("data.tokenizer", "\"\"", "name the tokenizer's file"));
        }
        if self.valid.is_empty() && self.valid_frac == 0. {
            let want = "there is nothing to validate on: name files, or set data.valid_frac to the share of the \
                        training documents to hold out";
            return Err(Error::setting("data.valid", "[]", want));
        }
        Ok(())
    }
}

impl TrainConfig {
    fn check(&self) -> Result<()> {
        let counts = [
            ("train.steps", self.steps),
            ("train.batch_size", self.batch_size as u64),
            ("train.grad_accum", self.grad_accum as u64),
            ("train.log_every", self.log_every),
        ];
        let fractions = [
            ("train.min_lr_frac", self.min_lr_frac),
            ("train.warmup_frac", self.warmup_frac),
            ("train.decay_frac", self.decay_frac),
        ];
        if let Some((key, value)) = counts.into_iter().find(|&(_, value)| value == 0) {
            return Err(Error::setting(key, value, "it must be at least 1"));
        }
        if let Some((key, value)) = fractions.into_iter().find(|(_, value)| !(0. ..=1.).contains(value)) {
            return Err(Error::setting(key, value, "it must be in 0..=1"));
        }
        const MOST: u64 = flowhn_nn::MAX_LOGITS_BYTES >> 20;
        if !(1..=MOST).contains(&self.logits_mib) {
            return Err(Error::setting("train.logits_mib", self.logits_mib, format!("it must be in 1..={MOST}")));
        }
        if self.linears == Linears::Fp8 && self.dtype != Dtype::Bf16 {
            let want =
                "8-bit floats are made of bf16 activations: set train.dtype = \"bf16\", or train.linears = \"dtype\"";
            return Err(Error::setting("train.linears", "fp8", want));
        }
        if self.grads == Dtype::Bf16 {
            let want = match (self.dtype, self.grad_accum) {
                (Dtype::Fp32, _) => {
                    Some("they come from bf16 activations: set train.dtype = \"bf16\", or train.grads = \"fp32\"")
                }
                (_, 2..) => Some(
                    "sums over micro-batches would be rounded each time: set train.grad_accum = 1, or train.grads = \"fp32\"",
                ),
                _ => None,
            };
            if let Some(want) = want {
                return Err(Error::setting("train.grads", self.grads, want));
            }
        }
        for (key, value) in [("train.beta1", self.beta1), ("train.beta2", self.beta2)] {
            if !(0. ..1.).contains(&value) {
                return Err(Error::setting(key, value, "it must be at least 0 and below 1"));
            }
        }
        for (key, value) in [("train.lr", self.lr), ("train.eps", self.eps)] {
            if !(value.is_finite() && value > 0.) {
                return Err(Error::setting(key, value, "it must be a finite number above 0"));
            }
        }
        for (key, value) in [("train.weight_decay", self.weight_decay), ("train.clip_norm", self.clip_norm)] {
            if !(value.is_finite() && value >= 0.) {
                return Err(Error::setting(key, value, "it must be a finite number, at least 0"));
            }
        }
        Ok(())
    }

    /// [`TrainConfig::logits_mib`] in bytes.
    pub fn logits_bytes(&self) -> u64 {
        self.logits_mib << 20
    }

    /// The learning rate of every update.
    pub fn learning_rate(&self) -> LearningRate {
        let share = |frac: f64| (frac * self.steps as f64).round() as u64;
        LearningRate {
            schedule: self.schedule,
            peak: self.lr,
            min_lr: self.lr * self.min_lr_frac,
            steps: self.steps,
            warmup_steps: share(self.warmup_frac),
            decay_steps: share(self.decay_frac),
        }
    }

    /// The optimiser's settings.
    pub fn optimizer(&self) -> AdamWOptions {
        AdamWOptions {
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            weight_decay: self.weight_decay,
            clip_norm: self.clip_norm,
            state: self.optim_state,
        }
    }
}

/// Every value under its dotted key, as TOML text.
fn flatten(table: Table) -> Vec<(String, String)> {
    fn walk(prefix: &str, value: Value, out: &mut Vec<(String, String)>) {
        match value {
            Value::Table(table) => {
                for (key, value) in table {
                    let key = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
                    walk(&key, value, out);
                }
            }
            value => out.push((prefix.to_owned(), value.to_string())),
        }
    }
    let mut out = Vec::new();
    walk("", Value::Table(table), &mut out);
    out
}
