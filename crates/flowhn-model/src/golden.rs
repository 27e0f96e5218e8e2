//! Golden files: outputs and gradients of public implementations on small random weights, checked against ours.
//!
//! A file holds `input_ids`, `logits`, `hidden.i`, weights `w.NAME` and gradients `g.NAME` of the mean next-token loss, under
//! the names of who made it, and as JSON in its metadata a `config`: shapes and mode (A to D) of the authors' released model, or the
//! `config.json` of a model of `transformers`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::config::{ModelConfig, RawModel, from_table};
use crate::model::Input;
use crate::names::{Family, Fold};
use crate::weights::WeightFile;
use crate::{Error, Model, Result, hf};

/// Most that logits and hidden states may differ, relative to the tensor's largest value.
pub const MAX_REL_OUTPUT: f64 = 1e-5;
/// Most that a gradient may differ, relative to the tensor's largest value.
pub const MAX_REL_GRAD: f64 = 1e-4;

/// A gradient below this share of the file's largest is rounding: where no token of a branch can reach the loss the true one is 0, and
/// two implementations need not round to it alike.
const VANISHING: f64 = f32::EPSILON as f64;
/// Such a gradient is judged relative to this share of the file's largest, which allows it the same rounding.
const VANISHING_SCALE: f64 = 1e-3;

/// What a check of one file found.
#[derive(Clone, Debug, Serialize)]
pub struct GoldenReport {
    /// The file, as given.
    pub file: PathBuf,
    /// Largest relative error of the logits.
    pub max_rel_logits: f64,
    /// Largest relative error of a hidden state.
    pub max_rel_hidden: f64,
    /// Largest relative error of a gradient.
    pub max_rel_grad: f64,
    /// Whether all are within [`MAX_REL_OUTPUT`] and [`MAX_REL_GRAD`].
    pub pass: bool,
}

/// The `config` of a file's metadata.
#[derive(Debug, Deserialize)]
struct GoldenConfig {
    mode: String,
    vocab_size: usize,
    d_model: usize,
    d_ff: usize,
    n_layers: usize,
    n_heads: usize,
    n_kv_heads: usize,
    seq_len: usize,
    d_state: usize,
    dt_rank: usize,
    d_conv: usize,
    expand: usize,
    rms_norm_eps: f64,
    #[serde(default)]
    rope: bool,
}

/// Runs the model of a golden file on `device` and compares.
///
/// # Errors
/// [`Error::Weights`] if the file is not a golden file or of a model that we do not have; those of the model.
pub fn check_golden(path: &Path, device: Device) -> Result<GoldenReport> {
    check_file(path, &WeightFile::read(path)?, device)
}

/// As [`check_golden`], with the bytes of a file called `path`.
#[cfg(feature = "selftest")]
pub(crate) fn check_golden_bytes(path: &Path, bytes: &[u8], device: Device) -> Result<GoldenReport> {
    check_file(path, &WeightFile::from_bytes(path, bytes)?, device)
}

fn check_file(path: &Path, file: &WeightFile, device: Device) -> Result<GoldenReport> {
    let fail = |message: String| Error::Weights { path: path.to_owned(), message };
    let subject = Subject::of(file).map_err(|error| fail(error.to_string()))?;
    let model = Model::new(&subject.config, device, 0)?;
    let tensor = |name: &str| file.tensors.get(name).ok_or_else(|| fail(format!("it has no `{name}`")));

    let weights: HashMap<String, Tensor> = file
        .tensors
        .iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix("w.")?.to_owned(), tensor.shallow_clone())))
        .collect();
    subject.family.load(&model, &weights, &subject.fold).map_err(|error| fail(error.to_string()))?;

    let ids = tensor("input_ids")?.to_device(device);
    let output = model.forward(&Input::new(&ids))?;
    let logits = output.logits;
    let max_rel_logits = max_rel(&logits, tensor("logits")?, 0.);
    let mut max_rel_hidden = 0f64;
    for (i, hidden) in recorded(&subject, &model, output.hidden)?.iter().enumerate() {
        max_rel_hidden = worst(max_rel_hidden, max_rel(hidden, tensor(&format!("hidden.{i}"))?, 0.));
    }

    // The loss of the file: position t predicts token t + 1, the last position predicts nothing.
    let seq_len = ids.size()[1];
    let targets = ids.narrow(1, 1, seq_len - 1).f_constant_pad_nd([0, 1]).map_err(Error::from)?;
    let targets = targets.index_fill(1, &Tensor::from_slice(&[seq_len - 1]).to_device(device), -100);
    model.loss(&ids, &targets, None)?.f_backward()?;
    let mut max_rel_grad = 0f64;
    let names = subject.family.names(&model)?;
    let mut largest = 0f64;
    for name in &names {
        largest = largest.max(max_abs(tensor(&format!("g.{}", name.theirs))?));
    }
    for name in &names {
        let want = tensor(&format!("g.{}", name.theirs))?;
        let grad = name.piece_of(&model, |weight| {
            let grad = weight.grad();
            Ok(if grad.defined() { grad } else { weight.f_zeros_like()? })
        })?;
        let floor = if max_abs(want) <= VANISHING * largest { VANISHING_SCALE * largest } else { 0. };
        let grad = subject.fold.apply(&name.theirs, &grad)?;
        max_rel_grad = worst(max_rel_grad, max_rel(&grad, want, floor));
    }

    let pass = max_rel_logits <= MAX_REL_OUTPUT && max_rel_hidden <= MAX_REL_OUTPUT && max_rel_grad <= MAX_REL_GRAD;
    Ok(GoldenReport { file: path.to_owned(), max_rel_logits, max_rel_hidden, max_rel_grad, pass })
}

/// What the subject's family records of the embeddings and the outputs of the blocks.
fn recorded(subject: &Subject, model: &Model, mut hidden: Vec<Tensor>) -> Result<Vec<Tensor>> {
    let Some(last) = hidden.pop() else { return Ok(hidden) };
    let normed = model.final_norm(&last)?;
    match subject.family {
        Family::Released => hidden.push(last),
        // What enters each block, and what leaves the final norm.
        Family::Llama | Family::Jamba => hidden.push(normed),
        // The same; the norm may have a factor that theirs has not.
        Family::FalconH1 => hidden.push(normed.f_div_scalar(subject.fold.factor(hf::FINAL_NORM))?),
        // What leaves each block, and what leaves the final norm.
        Family::Mamba | Family::Mamba2 => {
            hidden.extend([last, normed]);
            let _embeddings = hidden.remove(0);
        }
    }
    Ok(hidden)
}

/// The model that a file is about.
struct Subject {
    family: Family,
    config: ModelConfig,
    fold: Fold,
}

impl Subject {
    /// From the `config` in the metadata: that of the released script names a mode, that of transformers a `model_type`.
    fn of(file: &WeightFile) -> Result<Self> {
        let text = file.metadata.get("config");
        let text = text.ok_or_else(|| Error::Input("its metadata has no `config`".to_owned()))?;
        let seq_len = file.tensors.get("input_ids").and_then(|ids| ids.size().last().copied()).unwrap_or(1);
        if text.contains("\"model_type\"") {
            let hf::HfModel { family, config, fold, .. } = hf::read_config(text, seq_len as usize)?;
            return Ok(Self { family, config, fold });
        }
        let config: GoldenConfig = serde_json::from_str(text).map_err(|error| {
            Error::Input(format!("its `config` is neither of a released FlowHN model nor of transformers: {error}"))
        })?;
        Ok(Self { family: Family::Released, config: config.model()?, fold: Fold::default() })
    }
}

impl GoldenConfig {
    /// The configuration of the model that the file is about. Modes: A no_split, B ae_split, C fa_split, D fac_split.
    fn model(&self) -> Result<ModelConfig> {
        let policy = match self.mode.as_str() {
            "A" => "no_split",
            "B" => "ae_split",
            "C" => "fa_split",
            "D" => "fac_split",
            other => return Err(Error::Input(format!("mode `{other}` is none of A, B, C, D"))),
        };
        let text = format!(
            "vocab_size = {}\nd_model = {}\nd_ff = {}\nn_layers = {}\nseq_len = {}\nblock = \"released\"\n\
             init = \"released\"\nrms_norm_eps = {}\npadding_idx = 0\n\
             [attn]\nn_heads = {}\nn_kv_heads = {}\nrope = {}\n\
             [ssm]\nd_inner = {}\nd_state = {}\nd_conv = {}\ndt_rank = {}\n\
             [split]\npolicy = \"{policy}\"\nreleased = true\n",
            self.vocab_size,
            self.d_model,
            self.d_ff,
            self.n_layers,
            self.seq_len,
            format_args!("{:e}", self.rms_norm_eps),
            self.n_heads,
            self.n_kv_heads,
            self.rope,
            self.expand * self.d_model,
            self.d_state,
            self.d_conv,
            self.dt_rank,
        );
        let table = text.parse().map_err(|error: toml::de::Error| Error::Input(error.to_string()))?;
        ModelConfig::check(from_table::<RawModel>(table)?)
    }
}

/// Largest difference relative to the largest absolute value of `want`, or to `floor` where that is larger; infinite if the shapes
/// differ or a value is NaN.
fn max_rel(got: &Tensor, want: &Tensor, floor: f64) -> f64 {
    if got.size() != want.size() {
        return f64::INFINITY;
    }
    let want = to_double(want);
    let error = max_abs(&(to_double(got) - &want));
    match () {
        _ if error.is_nan() => f64::INFINITY,
        _ if error == 0. => 0.,
        _ => error / max_abs(&want).max(floor),
    }
}

fn max_abs(tensor: &Tensor) -> f64 {
    if tensor.numel() == 0 { 0. } else { to_double(tensor).abs().max().double_value(&[]) }
}

fn to_double(tensor: &Tensor) -> Tensor {
    tensor.detach().to_device(Device::Cpu).to_kind(Kind::Double)
}

fn worst(a: f64, b: f64) -> f64 {
    if b > a { b } else { a }
}
