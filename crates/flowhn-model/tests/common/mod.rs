//! Small models of every kind, for the tests of this crate.
#![allow(dead_code, reason = "each test file uses a part")]

use flowhn_model::config::{ModelConfig, RawModel, from_table};
use flowhn_model::{Model, Result};
use tch::{Device, Kind, Tensor};

/// The training length of the small models: not a multiple of the tile or chunk, so spans are uneven.
pub const SEQ_LEN: usize = 45;
pub const VOCAB: i64 = 61;

/// A model by its policy line, block kind and mixer; `extra` may add keys to `[attn]`.
pub fn config(split: &str, block: &str, mixer: &str, extra: &str) -> Result<ModelConfig> {
    let mixer = match mixer {
        "mamba1" => "mixer = \"mamba1\"\nd_inner = 40\nd_state = 8",
        _ => "mixer = \"mamba2\"\nd_inner = 48\nd_state = 16\nd_head = 12\nn_groups = 2\nchunk_len = 8",
    };
    let text = format!(
        "vocab_size = {VOCAB}\nd_model = 32\nd_ff = 48\nn_layers = 4\nseq_len = {SEQ_LEN}\nblock = \"{block}\"\n\
         [attn]\nn_heads = 4\nn_kv_heads = 2\nd_head = 6\n{extra}\n[ssm]\n{mixer}\n\
         [split]\ntile = 4\nchunk_len = 4\n{split}\n"
    );
    ModelConfig::check(from_table::<RawModel>(text.parse().unwrap())?)
}

pub fn model(split: &str, block: &str, mixer: &str, extra: &str) -> Model {
    let config = config(split, block, mixer, extra).unwrap();
    let model = Model::new(&config, Device::Cpu, 11).unwrap();
    // Initial weights keep activations small; larger ones make differences show.
    for param in model.params() {
        if param.name.ends_with("proj.weight") || param.name.ends_with("embed.weight") {
            model.params().assign(&param.name, &(param.weight.master().detach() * 3.)).unwrap();
        }
    }
    model
}

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

/// Pseudo-random ids `[batch, len]`.
pub fn ids(batch: i64, len: usize, seed: i64) -> Tensor {
    let n = batch * len as i64;
    let mixed = (Tensor::arange(n, (Kind::Int64, Device::Cpu)) + seed * 977) * 7919 + 13;
    ((&mixed * &mixed + mixed) / 3).remainder(VOCAB).to_kind(Kind::Int64).view([batch, len as i64])
}

/// Largest difference relative to the largest value of `want`.
pub fn max_rel(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.size(), want.size());
    ((got - want).abs().max() / want.abs().max()).double_value(&[])
}

/// Block kinds, mixers and extra keys of attention that a property is tested with.
pub fn variants() -> Vec<(&'static str, &'static str, &'static str)> {
    vec![
        ("released", "mamba1", ""),
        ("released", "mamba2", ""),
        ("flow", "mamba1", "rope = true"),
        ("flow", "mamba2", ""),
        ("flow", "mamba1", "bridge = \"kv\"\nrope = true"),
    ]
}
