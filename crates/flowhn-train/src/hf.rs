//! Checkpoints of Hugging Face's `transformers`, in and out.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use flowhn_model::{Error as ModelError, Family, Model, WeightFile, hf};
use serde::Deserialize;
use tch::{Device, Tensor};

use crate::checkpoint::{self, Progress, Snapshot};
use crate::config::{DataConfig, RunConfig, RunSection, TrainConfig};
use crate::data::{Fingerprint, SamplerState, Tokenizer};
use crate::run_dir::{CONFIG, RunDir, Start, TOKENIZER};
use crate::storage::Disk;
use crate::{Error, Result};

const HF_CONFIG: &str = "config.json";
const HF_WEIGHTS: &str = "model.safetensors";
const HF_INDEX: &str = "model.safetensors.index.json";

/// What [`import`] is told.
#[derive(Clone, Debug)]
pub struct ImportOptions {
    /// The directory with `config.json`, the weights (`model.safetensors`, or shards and their index) and perhaps `tokenizer.json`.
    pub from: PathBuf,
    /// The run's directory to make.
    pub to: PathBuf,
    /// Tokens that the model is planned for; `None` for the file's `max_position_embeddings`, at most 8192.
    pub seq_len: Option<usize>,
    /// The tokenizer, if it is another than the directory's.
    pub tokenizer: Option<PathBuf>,
}

/// What [`import`] made.
#[derive(Debug)]
pub struct Imported {
    /// The checkpoint, in the new run's directory.
    pub checkpoint: PathBuf,
    /// The family of the model.
    pub family: Family,
    /// Parameters.
    pub parameters: u64,
    /// What became of multipliers, and what stayed behind, each a sentence: keys of `config.json` that have no counterpart here and, as far as is known, change
    /// nothing; a tokenizer.
    pub warnings: Vec<String>,
}

/// Makes a run's directory of a checkpoint of `transformers`: [`crate::Trained::load`] reads it like any other.
///
/// The optimiser's state is empty: such a run is there to evaluate, generate and export, not to resume.
///
/// # Errors
/// [`Error::Model`] that names a value of `config.json` that is not supported, or lists tensors that are missing, left over or of a
/// wrong shape; [`Error::Io`] for files; those of [`RunDir::open`] for the target.
pub fn import(options: &ImportOptions) -> Result<Imported> {
    let path = options.from.join(HF_CONFIG);
    let text = fs::read_to_string(&path).map_err(Error::io(&path, "read"))?;
    let in_config = |error: ModelError| file_error(&path, &error);
    let seq_len = match options.seq_len {
        Some(seq_len) => seq_len,
        None => hf::max_position(&text).map_err(in_config)?.unwrap_or(2048).min(8192),
    };
    let hf::HfModel { family, config, fold, ignored } = hf::read_config(&text, seq_len).map_err(in_config)?;
    let model = Model::new(&config, Device::Cpu, 0)?;
    let mut tensors = read_weights(&options.from)?;
    // Older files of Llama hold a table that follows from the configuration.
    tensors.retain(|name, _| !name.ends_with("rotary_emb.inv_freq"));
    family.load(&model, &tensors, &fold).map_err(|error| file_error(&options.from, &error))?;

    let mut warnings = Vec::new();
    if !fold.is_empty() {
        warnings.push(
            "the multipliers of config.json are now factors of the weights: the logits are the same, and an export has multipliers of 1"
                .to_owned(),
        );
    }
    if !ignored.is_empty() {
        warnings.push(format!("config.json has keys that mean nothing here: {}", ignored.join(", ")));
    }
    let tokenizer = find_tokenizer(options, &mut warnings)?;
    let run = RunDir::open(&options.to, Start::Fresh, std::sync::Arc::new(Disk))?;
    let copy = run.file(TOKENIZER);
    if let Some(tokenizer) = &tokenizer {
        run.write(TOKENIZER, &fs::read(tokenizer.path()).map_err(Error::io(tokenizer.path(), "read"))?)?;
    }
    let config = RunConfig {
        model: config,
        data: DataConfig {
            tokenizer: if tokenizer.is_some() { copy } else { PathBuf::new() },
            ..DataConfig::default()
        },
        train: TrainConfig::default(),
        run: RunSection { dir: options.to.clone() },
    };
    let toml = config.to_toml()?;
    run.write(CONFIG, toml.as_bytes())?;
    let snapshot = Snapshot {
        progress: progress(seq_len, tokenizer.as_ref().map_or(Fingerprint::NONE, Tokenizer::fingerprint)),
        config: &toml,
        model: model.params().iter().map(|p| (p.name.clone(), p.weight.master().detach())).collect(),
        optimizer: Vec::new(),
    };
    let checkpoint = checkpoint::save(run.storage(), &run.checkpoints(), &snapshot)?;
    Ok(Imported { checkpoint, family, parameters: model.params().n_elements(), warnings })
}

/// The tokenizer that was asked for, or that of the directory if it can be used.
fn find_tokenizer(options: &ImportOptions, warnings: &mut Vec<String>) -> Result<Option<Tokenizer>> {
    const REMEDY: &str = "name one with --tokenizer to evaluate and generate";
    if let Some(path) = &options.tokenizer {
        return Ok(Some(Tokenizer::load(path)?));
    }
    let path = options.from.join(TOKENIZER);
    if !path.is_file() {
        warnings.push(format!("there is no {}: {REMEDY}", path.display()));
        return Ok(None);
    }
    match Tokenizer::load(&path) {
        Ok(tokenizer) => Ok(Some(tokenizer)),
        Err(error) => {
            warnings.push(format!("the tokenizer stays behind: {error}; {REMEDY}"));
            Ok(None)
        }
    }
}

/// What [`export`] wrote.
#[derive(Clone, Debug)]
pub struct Exported {
    /// The family of `transformers` that the model is a member of.
    pub family: Family,
    /// What to know before the files are used elsewhere, each a sentence.
    pub warnings: Vec<String>,
}

/// Writes a model as a checkpoint of `transformers`: `config.json` and `model.safetensors`, f32, and the tokenizer's file if there is
/// one.
///
/// # Errors
/// [`Error::Model`] that says what no family of `transformers` has; [`Error::Io`] and its kin for files.
pub fn export(model: &Model, tokenizer: Option<&Path>, to: &Path) -> Result<Exported> {
    let (family, json) = hf::write_config(model.config())?;
    let mut tensors = family.export(model)?;
    if family == Family::Mamba2 && model.config().tie_embeddings {
        // transformers 4.57 does not know that this family's head may be tied, and would start it at random.
        let embed = tensors.iter().find(|(name, _)| name == "backbone.embeddings.weight");
        let head = embed.map(|(_, embed)| ("lm_head.weight".to_owned(), embed.shallow_clone()));
        tensors.extend(head);
    }
    fs::create_dir_all(to).map_err(Error::io(to, "create the directory"))?;
    let text =
        serde_json::to_string_pretty(&json).map_err(|error| Error::setting("config.json", "", error.to_string()))?;
    crate::storage::write_atomically(&Disk, &to.join(HF_CONFIG), (text + "\n").as_bytes())?;
    // Without this word transformers does not take the file.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    checkpoint::write_tensors(&Disk, &to.join(HF_WEIGHTS), &tensors, Some(metadata))?;
    if let Some(tokenizer) = tokenizer.filter(|path| path.is_file()) {
        let bytes = fs::read(tokenizer).map_err(Error::io(tokenizer, "read"))?;
        crate::storage::write_atomically(&Disk, &to.join(TOKENIZER), &bytes)?;
    }
    Ok(Exported { family, warnings: hf::warnings(family, model.config()) })
}

/// All tensors of a directory, of one file or of the shards that an index lists.
fn read_weights(dir: &Path) -> Result<HashMap<String, Tensor>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let index = dir.join(HF_INDEX);
    let single = dir.join(HF_WEIGHTS);
    if !index.is_file() {
        if !single.is_file() {
            let message = format!(
                "there is neither {HF_WEIGHTS} nor {HF_INDEX}; weights of other formats are turned into these by \
                 `AutoModelForCausalLM.from_pretrained(dir).save_pretrained(dir, safe_serialization=True)`"
            );
            return Err(ModelError::Weights { path: dir.to_owned(), message }.into());
        }
        return Ok(WeightFile::read(&single)?.tensors);
    }
    let text = fs::read_to_string(&index).map_err(Error::io(&index, "read"))?;
    let invalid = |message: String| Error::from(ModelError::Weights { path: index.clone(), message });
    let Index { weight_map } = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
    let shards: BTreeSet<&String> = weight_map.values().collect();
    let mut tensors = HashMap::new();
    for shard in shards {
        tensors.extend(WeightFile::read(&dir.join(shard))?.tensors);
    }
    let mut absent: Vec<&String> = weight_map.keys().filter(|name| !tensors.contains_key(*name)).collect();
    if !absent.is_empty() {
        absent.sort_unstable();
        return Err(invalid(format!("it lists tensors that its shards do not hold: {absent:?}")));
    }
    Ok(tensors)
}

fn file_error(path: &Path, error: &ModelError) -> Error {
    ModelError::Weights { path: path.to_owned(), message: error.to_string() }.into()
}

/// Where a run stands that was never trained here.
fn progress(seq_len: usize, tokenizer: Fingerprint) -> Progress {
    Progress {
        step: 0,
        tokens: 0,
        elapsed_s: 0.,
        n_threads: tch::get_num_threads().max(1) as usize,
        device_type: None,
        sampler: SamplerState { seed: 0, epoch: 0, index: 0, n_windows: 0, seq_len, data: Fingerprint::NONE },
        tokenizer,
    }
}
