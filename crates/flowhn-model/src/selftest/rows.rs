//! The public models that are configurations of ours, small: each with what only it has.

use flowhn_torch::testing::Case;
use tch::{Device, Kind, Tensor, no_grad};

use super::small::{SEQ_LEN, VOCAB, enlarge_weights, ids};
use super::{case, case_on_cuda, causality, decode, ensure};
use crate::config::{ModelConfig, RawModel, from_table};
use crate::{Error, Input, Model, Result};

/// Name and section, but for the sizes that all share.
pub(super) const ROWS: [(&str, &str); 9] = [
    (
        "llama with biases",
        "d_ff = 48\nmlp_bias = true\ntie_embeddings = true\n\
         [attn]\nn_heads = 4\nn_kv_heads = 1\nd_head = 6\nbias = true\nrope = true\n[split]\npolicy = \"attn_all\"",
    ),
    (
        "mamba with biases",
        "d_ff = 0\n[ssm]\nd_inner = 40\nd_state = 8\nd_conv = 3\ninner_norms = false\nproj_bias = true\n\
         [split]\npolicy = \"ssm_all\"",
    ),
    (
        "mamba2, strided groups, no bias in the convolution",
        "d_ff = 0\n[ssm]\nmixer = \"mamba2\"\nd_inner = 48\nd_state = 16\nd_head = 12\nn_groups = 2\nchunk_len = 8\n\
         group_order = \"strided\"\nconv_bias = false\n[split]\npolicy = \"ssm_all\"",
    ),
    (
        "jamba",
        "d_ff = 48\n[attn]\nn_heads = 4\nn_kv_heads = 2\n[ssm]\nd_inner = 40\nd_state = 8\n\
         [split]\npolicy = [\"ssm_all\", \"attn_all\", \"ssm_all\"]",
    ),
    (
        "hymba",
        "d_ff = 48\nfusion = \"mean\"\nmixer_norms = true\nn_meta = 5\n\
         [attn]\nn_heads = 4\nn_kv_heads = 2\nd_head = 6\nrope = true\nwindow = 9\nglobal_blocks = [1]\n\
         [ssm]\nd_inner = 40\nd_state = 8\n[split]\npolicy = \"no_split\"",
    ),
    (
        "falcon-h1, a gate without norm, biases",
        "d_ff = 48\nmlp_bias = true\nfusion = \"none\"\nshared_norm = true\n\
         [attn]\nn_heads = 4\nn_kv_heads = 2\nd_head = 6\nrope = true\nbias = true\n\
         [ssm]\nmixer = \"mamba2\"\nd_inner = 48\nd_state = 16\nd_head = 12\nn_groups = 2\nchunk_len = 8\ngate_norm = \"none\"\n\
         proj_bias = true\n[split]\npolicy = \"no_split\"",
    ),
    (
        "falcon-h1, the norm before the gate, tied",
        "d_ff = 48\nfusion = \"none\"\nshared_norm = true\ntie_embeddings = true\n\
         [attn]\nn_heads = 4\nn_kv_heads = 2\nd_head = 6\nrope = true\n\
         [ssm]\nmixer = \"mamba2\"\nd_inner = 48\nd_state = 16\nd_head = 12\nn_groups = 2\nchunk_len = 8\n\
         gate_norm = \"before_gate\"\nnorm_groups = 2\nout_proj_bias = true\n[split]\npolicy = \"no_split\"",
    ),
    (
        "one norm for branches that share out the tokens, or a bridge",
        "d_ff = 48\nshared_norm = true\n[attn]\nn_heads = 4\nn_kv_heads = 2\nd_head = 6\nrope = true\nbridge = \"kv\"\n\
         [ssm]\nd_inner = 40\nd_state = 8\n[split]\ntile = 4\nchunk_len = 4\npolicy = [\"cyclic_split\", \"ae_split\", \"no_split\"]",
    ),
    (
        "a window without learned tokens",
        "d_ff = 48\n[attn]\nn_heads = 4\nrope = true\nwindow = 9\n[split]\npolicy = \"attn_all\"",
    ),
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, section) in ROWS {
        let mut add = |what: &str, check: fn(&Model, Device) -> Result<()>| {
            cases.push(case(format!("{what}: {name}"), move |device| {
                check(&model(section, device)?, device)?;
                Ok(String::new())
            }));
        };
        add("causality", causality::later_tokens_do_not_matter);
        add("decode", decode_equals_the_full_forward);
        add("packing", documents_stay_apart_or_are_refused);
        cases.push(case_on_cuda(format!("decode as CUDA graphs: {name}"), move |device| {
            let mut model = model(section, device)?;
            for kind in [Kind::Float, Kind::BFloat16] {
                model.set_compute_kind(kind);
                decode::launches_agree(&model)?;
            }
            Ok(String::new())
        }));
    }
    cases.push(case("learned tokens reach every token through any window".to_owned(), learned_tokens_are_seen));
    cases
}

pub(super) fn model(section: &str, device: Device) -> Result<Model> {
    let text = format!("vocab_size = {VOCAB}\nd_model = 32\nn_layers = 3\nseq_len = {SEQ_LEN}\n{section}\n");
    let table = text.parse().map_err(|error: toml::de::Error| Error::Input(error.to_string()))?;
    let model = Model::new(&ModelConfig::check(from_table::<RawModel>(table)?)?, device, 11)?;
    enlarge_weights(&model)?;
    Ok(model)
}

fn decode_equals_the_full_forward(model: &Model, device: Device) -> Result<()> {
    decode::equals_the_full_forward(model, &decode::long_ids(device)).map(drop)
}

fn documents_stay_apart_or_are_refused(model: &Model, device: Device) -> Result<()> {
    if model.config().options.n_meta == 0 {
        return causality::documents_do_not_matter(model, device);
    }
    let segments = Tensor::zeros([1, SEQ_LEN as i64], (Kind::Int64, device));
    let refused = |input: &Input, want: &str| match model.forward(input) {
        Err(Error::Input(message)) if message.contains(want) => Ok(()),
        other => Err(Error::Input(format!("expected a refusal about {want}, got {other:?}"))),
    };
    let ids = ids(1, SEQ_LEN, 9, device);
    refused(&Input::new(&ids).with_segments(Some(&segments)), "data.reset_documents = false")?;
    refused(&Input::new(&ids).at(3), "begins at position 0")
}

/// With one block whose window is a token wide, and attention alone, only learned tokens tell a token anything but itself.
fn learned_tokens_are_seen(device: Device) -> Result<String> {
    let section = "d_ff = 0\nn_meta = 3\n[attn]\nn_heads = 4\nwindow = 1\n[split]\npolicy = \"attn_all\"";
    let model = model(section, device)?;
    let ids = ids(1, SEQ_LEN, 9, device);
    let before = no_grad(|| model.logits(&ids, None))?;
    let meta = model.params().get("meta").ok_or_else(|| Error::Input("there are no learned tokens".to_owned()))?;
    model.params().assign("meta", &(meta.weight.master().detach() * -2.))?;
    let after = no_grad(|| model.logits(&ids, None))?;
    let moved = (after - before).abs().amax([0, 2], false).min().double_value(&[]);
    ensure(moved > 1e-4, || format!("a token moved by {moved:.1e} when the learned ones changed"))?;
    Ok(format!("every token moved by at least {moved:.1e}"))
}
