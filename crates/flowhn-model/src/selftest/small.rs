//! Small models of every kind.

use tch::{Device, Kind, Tensor};

use crate::config::{ModelConfig, RawModel, from_table};
use crate::{Error, Model, Result};

/// The training length of the small models: not a multiple of the tile or chunk, so spans are uneven.
pub const SEQ_LEN: usize = 45;
/// Their vocabulary.
pub const VOCAB: i64 = 61;

/// Every policy, as lines of `[split]`.
pub const POLICIES: [&str; 11] = [
    "policy = \"no_split\"",
    "policy = \"ae_split\"",
    "policy = \"fa_split\"",
    "policy = \"fa_split\"\nwindow = \"first\"",
    "policy = \"fac_split\"",
    "policy = \"fac_split\"\nattn_frac = 0.3",
    "policy = \"cyclic_split\"",
    "policy = \"attn_all\"",
    "policy = \"ssm_all\"",
    "policy = \"cyclic_split\"\nfirst_blocks = [\"ssm_all\"]",
    "policy = [\"ssm_all\", \"attn_all\", \"no_split\", \"fac_split\"]",
];

/// A kind of block, of mixer, and further keys of `[attn]`.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    /// `released` or `flow`.
    pub block: &'static str,
    /// `mamba1` or `mamba2`.
    pub mixer: &'static str,
    /// Lines of `[attn]`.
    pub attn: &'static str,
}

/// The kinds of model that every property is tested with.
pub const VARIANTS: [Variant; 5] = [
    Variant { block: "released", mixer: "mamba1", attn: "" },
    Variant { block: "released", mixer: "mamba2", attn: "" },
    Variant { block: "flow", mixer: "mamba1", attn: "rope = true" },
    Variant { block: "flow", mixer: "mamba2", attn: "" },
    Variant { block: "flow", mixer: "mamba1", attn: "bridge = \"kv\"\nrope = true" },
];

impl Variant {
    /// In a few words.
    pub fn name(&self) -> String {
        let Self { block, mixer, attn } = self;
        [&[*block, *mixer][..], &attn.lines().collect::<Vec<_>>()].concat().join(" ")
    }

    /// The configuration with these lines of `[split]`.
    ///
    /// # Errors
    /// Those of [`ModelConfig::check`].
    pub fn config(&self, split: &str) -> Result<ModelConfig> {
        let Self { block, mixer, attn } = self;
        let mixer = match *mixer {
            "mamba1" => "mixer = \"mamba1\"\nd_inner = 40\nd_state = 8",
            _ => "mixer = \"mamba2\"\nd_inner = 48\nd_state = 16\nd_head = 12\nn_groups = 2\nchunk_len = 8",
        };
        let text = format!(
            "vocab_size = {VOCAB}\nd_model = 32\nd_ff = 48\nn_layers = 4\nseq_len = {SEQ_LEN}\nblock = \"{block}\"\n\
             [attn]\nn_heads = 4\nn_kv_heads = 2\nd_head = 6\n{attn}\n[ssm]\n{mixer}\n\
             [split]\ntile = 4\nchunk_len = 4\n{split}\n"
        );
        let table = text.parse().map_err(|error: toml::de::Error| Error::Input(error.to_string()))?;
        ModelConfig::check(from_table::<RawModel>(table)?)
    }

    /// The model with fixed weights, larger than initial ones, so that differences show.
    ///
    /// # Errors
    /// As [`Model::new`].
    pub fn model(&self, split: &str, device: Device) -> Result<Model> {
        let model = Model::new(&self.config(split)?, device, 11)?;
        enlarge_weights(&model)?;
        Ok(model)
    }
}

/// Makes matrices larger than they start, and biases other than zero, so that differences show.
pub(super) fn enlarge_weights(model: &Model) -> Result<()> {
    for param in model.params().iter() {
        let weight = param.weight.master().detach();
        if ["proj.weight", "embed.weight", "meta"].iter().any(|name| param.name.ends_with(name)) {
            model.params().assign(&param.name, &(weight * 3.))?;
        } else if param.name.ends_with("proj.bias") && !param.name.ends_with("dt_proj.bias") {
            let noise = Tensor::arange(weight.numel() as i64, (Kind::Float, weight.device())).sin();
            model.params().assign(&param.name, &(noise * 0.3))?;
        }
    }
    Ok(())
}

/// Pseudo-random ids `[batch, len]`.
pub fn ids(batch: i64, len: usize, seed: i64, device: Device) -> Tensor {
    let n = batch * len as i64;
    let mixed = (Tensor::arange(n, (Kind::Int64, Device::Cpu)) + seed * 977) * 7919 + 13;
    let ids = ((&mixed * &mixed + mixed) / 3).remainder(VOCAB).to_kind(Kind::Int64);
    ids.view([batch, len as i64]).to_device(device)
}
