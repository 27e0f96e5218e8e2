//! What the CPU benchmarks in `benches/` share: the small model that all of them are about.
#![forbid(unsafe_code)]

use flowhn_model::config::{ModelConfig, RawModel, from_table};
use tch::{Device, Kind, Tensor};

/// Sequences of a batch.
pub const BATCH: i64 = 8;
/// Tokens of a sequence.
pub const SEQ_LEN: i64 = 256;
/// Width of the model.
pub const D_MODEL: i64 = 128;

/// Sets the process up as the `flowhn` binary does, so that a benchmark meets the memory that training meets.
pub fn set_up() {
    flowhn_torch::keep_freed_host_memory();
}

/// The small released model of the CPU benchmarks, with `n_layers` blocks and a vocabulary of `vocab_size`.
///
/// # Panics
/// If the configuration in this file is wrong.
pub fn model_config(n_layers: usize, vocab_size: usize) -> ModelConfig {
    let text = format!(
        "vocab_size = {vocab_size}\nd_model = {D_MODEL}\nd_ff = 344\nn_layers = {n_layers}\nseq_len = {SEQ_LEN}\n\
         block = \"released\"\n[attn]\nn_heads = 4\nn_kv_heads = 2\n[split]\npolicy = \"fa_split\"\nreleased = true"
    );
    let table = text.parse::<toml::Table>().expect("the text above is TOML");
    let raw: RawModel = from_table(table).expect("its keys are those of a model");
    ModelConfig::check(raw).expect("its sizes fit together")
}

/// Pseudo-random token ids `[BATCH, SEQ_LEN]`.
pub fn ids(vocab_size: i64) -> Tensor {
    Tensor::randint(vocab_size, [BATCH, SEQ_LEN], (Kind::Int64, Device::Cpu))
}
