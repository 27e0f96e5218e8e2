//! Falcon-H1 (`modeling_falcon_h1.py`): attention and Mamba-2 on all tokens behind one norm, their sum, and an MLP, with numbers that
//! multiply what passes between the matrices. Reading makes them factors of the matrices; what is written has ones in their places.

use std::fmt::Write as _;

use flowhn_split::{Fusion, GateNorm, SsmShape};
use serde_json::{Value, json};

use super::keys::Keys;
use super::read::{expanded, outer, padding_or_0, rope};
use super::write::ratio;
use super::write::rope_scaling;
use crate::config::{GroupOrder, ModelConfig};
use crate::names::Fold;
use crate::{Error, Result};

/// What the mixers' input projection makes, in the order of its rows: z, x, B, C, dt.
const N_SEGMENTS: usize = 5;

/// The `[model]` section, and the multipliers as factors of weights.
pub(super) fn read(keys: &Keys) -> Result<(String, Fold)> {
    let d_model = keys.size("hidden_size")?;
    let n_heads = keys.size_or("num_attention_heads", 32)?;
    // The defaults of the two are not alike: absent is 8 and 1024, null what follows from the other sizes.
    let n_kv_heads = if keys.has("num_key_value_heads") { n_heads } else { 8 };
    let d_ssm = if keys.has("mamba_d_ssm") { expanded(keys, "mamba_expand", d_model)? } else { 1024 };
    let (d_inner, n_ssm_heads) = (keys.size_or("mamba_d_ssm", d_ssm)?, keys.size_or("mamba_n_heads", 128)?);
    let d_head = keys.size_or_auto("mamba_d_head", d_inner / n_ssm_heads.max(1))?;
    if n_ssm_heads * d_head != d_inner {
        return Err(Error::Input(format!(
            "`mamba_n_heads` times `mamba_d_head` is {}, but `mamba_d_ssm` is {d_inner}: the two must be equal",
            n_ssm_heads * d_head
        )));
    }
    let (n_groups, d_state) = (keys.size_or("mamba_n_groups", 1)?, keys.size_or("mamba_d_state", 256)?);
    keys.only("attention_dropout", &[json!(0), json!(0.0)])?;
    keys.only("time_step_limit", &[json!([0.0, null]), json!([0, null]), json!([0.0, {"__float__": "Infinity"}])])?;
    keys.ignore(&[
        "num_logits_to_keep",
        "mamba_expand",
        "mamba_use_mlp",
        "mlp_expansion_factor",
        "mamba_norm_before_gate",
    ]);
    keys.ignore(&["time_step_min", "time_step_max", "time_step_floor", "time_step_rank"]);
    let norm = match (keys.flag_or("mamba_rms_norm", false)?, keys.flag_or("mamba_norm_before_gate", true)?) {
        (false, _) => "gate_norm = \"none\"".to_owned(),
        (true, true) => format!("gate_norm = \"before_gate\"\nnorm_groups = {n_groups}"),
        (true, false) => format!("gate_norm = \"after_gate\"\nnorm_groups = {n_groups}"),
    };
    let mut section = outer(keys, "rms_norm_eps", 1e-5, false)?;
    let _ = write!(
        section,
        "d_ff = {}\nmlp_bias = {}\nfusion = \"none\"\nshared_norm = true\n{}\
         [attn]\nn_heads = {n_heads}\nn_kv_heads = {}\nd_head = {}\nbias = {}\n{}\
         [ssm]\nmixer = \"mamba2\"\nd_inner = {d_inner}\nd_state = {d_state}\nd_conv = {}\nd_head = {d_head}\n\
         n_groups = {n_groups}\nchunk_len = {}\n{norm}\nconv_bias = {}\nproj_bias = {}\nout_proj_bias = {}\n",
        keys.size("intermediate_size")?,
        keys.flag_or("mlp_bias", false)?,
        padding_or_0(keys)?,
        keys.size_or("num_key_value_heads", n_kv_heads)?,
        keys.size_or("head_dim", d_model / n_heads.max(1))?,
        keys.flag_or("attention_bias", false)?,
        rope(keys, 100_000.)?,
        keys.size_or("mamba_d_conv", 4)?,
        keys.size_or("mamba_chunk_size", 256)?,
        keys.flag_or("mamba_conv_bias", true)?,
        keys.flag_or("mamba_proj_bias", false)?,
        keys.flag_or("projectors_bias", false)?,
    );
    Ok((section, fold(keys, [d_inner, d_inner, n_groups * d_state, n_groups * d_state, n_ssm_heads])?))
}

/// The multipliers as factors; `segments` are the numbers of rows of the mixer's input projection.
fn fold(keys: &Keys, segments: [usize; N_SEGMENTS]) -> Result<Fold> {
    let [embedding] = multipliers(keys, "embedding_multiplier")?;
    let [head] = multipliers(keys, "lm_head_multiplier")?;
    let [attn_in] = multipliers(keys, "attention_in_multiplier")?;
    let [attn_out] = multipliers(keys, "attention_out_multiplier")?;
    let [key] = multipliers(keys, "key_multiplier")?;
    let [gate, down] = multipliers(keys, "mlp_multipliers")?;
    let [ssm_in] = multipliers(keys, "ssm_in_multiplier")?;
    let [ssm_out] = multipliers(keys, "ssm_out_multiplier")?;
    let of_segments: [f64; N_SEGMENTS] = multipliers(keys, "ssm_multipliers")?;
    // The numbers of attention and mixer stand before their matrices, those of the segments behind the bias.
    let rows = |input: f64| segments.iter().zip(of_segments).map(|(&n, factor)| (n as i64, input * factor)).collect();
    let mut fold = Fold::default();
    fold.whole("model.embed_tokens.weight", embedding);
    match keys.flag_or("tie_word_embeddings", false)? {
        // The head's matrix is the embedding's and has its factor: the norm before it makes up for the difference.
        true => fold.whole(FINAL_NORM, head / embedding),
        false => fold.whole("lm_head.weight", head),
    }
    fold.whole("self_attn.q_proj.weight", attn_in);
    fold.whole("self_attn.k_proj.weight", attn_in * key);
    fold.whole("self_attn.k_proj.bias", key);
    fold.whole("self_attn.v_proj.weight", attn_in);
    fold.rows("mamba.in_proj.weight", rows(ssm_in));
    fold.rows("mamba.in_proj.bias", rows(1.));
    for (weight, bias, factor) in [
        ("self_attn.o_proj.weight", "self_attn.o_proj.bias", attn_out),
        ("mamba.out_proj.weight", "mamba.out_proj.bias", ssm_out),
        ("feed_forward.gate_proj.weight", "feed_forward.gate_proj.bias", gate),
        ("feed_forward.down_proj.weight", "feed_forward.down_proj.bias", down),
    ] {
        fold.whole(weight, factor);
        fold.whole(bias, factor);
    }
    Ok(fold)
}

/// The norm whose output the head reads.
pub(crate) const FINAL_NORM: &str = "model.final_layernorm.weight";

/// One multiplier or a list of them, 1 where the key is absent or null; one that is 0 would cut the model in two.
fn multipliers<const N: usize>(keys: &Keys, key: &str) -> Result<[f64; N]> {
    let numbers = keys.numbers_or(key, [1.; N])?;
    match numbers.iter().find(|number| !number.is_normal()) {
        Some(number) => Err(Error::Input(format!("`{key}` has {number}, expected finite numbers other than 0"))),
        None => Ok(numbers),
    }
}

/// The `config.json` of a flow model whose blocks send every token to both branches.
pub(super) fn write(config: &ModelConfig) -> Result<Value> {
    let (attn, options) = (config.attn, &config.options);
    let refuse = |what: &str| {
        Err(Error::Input(format!("of the models of transformers that have both branches none has {what}")))
    };
    let SsmShape::Mamba2 { d_inner, d_state, d_conv, d_head, n_groups } = config.ssm else {
        return refuse("Mamba-1 (model.ssm.mixer)");
    };
    let n_heads = d_inner / d_head.max(1);
    let (no_norm, strided) = (options.gate_norm == GateNorm::None, config.group_order == GroupOrder::Strided);
    for (there, what) in [
        (!options.shared_norm, "a norm for each of them (model.shared_norm = false)"),
        (config.fusion != Fusion::None, "another fusion than their sum (model.fusion = \"none\")"),
        (config.d_ff == 0, "no MLP (model.d_ff = 0)"),
        (strided && n_groups > 1 && n_groups < n_heads, "strided groups (model.ssm.group_order)"),
        (
            !no_norm && config.norm_groups != n_groups,
            "other groups in its norm than in B and C (model.ssm.norm_groups)",
        ),
    ] {
        if there {
            return refuse(what);
        }
    }
    let Some(rope) = config.rope else { return refuse("no positions (model.attn.rope = false)") };
    Ok(json!({
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "intermediate_size": config.d_ff,
        "num_attention_heads": attn.n_heads,
        "num_key_value_heads": attn.n_kv_heads,
        "head_dim": attn.d_head,
        "attention_bias": options.attn_bias,
        "attention_dropout": 0.0,
        "mlp_bias": options.mlp_bias,
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": rope_scaling(rope),
        "mamba_d_ssm": d_inner,
        "mamba_expand": ratio(d_inner, config.d_model),
        "mamba_n_heads": n_heads,
        "mamba_d_head": d_head,
        "mamba_n_groups": n_groups,
        "mamba_d_state": d_state,
        "mamba_d_conv": d_conv,
        "mamba_chunk_size": config.ssd_chunk_len,
        "mamba_conv_bias": options.conv_bias,
        "mamba_proj_bias": options.ssm_bias,
        "projectors_bias": options.ssm_out_bias,
        "mamba_rms_norm": options.gate_norm != GateNorm::None,
        "mamba_norm_before_gate": options.gate_norm == GateNorm::BeforeGate,
        "embedding_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 1.0,
        "key_multiplier": 1.0,
        "mlp_multipliers": [1.0, 1.0],
        "ssm_in_multiplier": 1.0,
        "ssm_out_multiplier": 1.0,
        "ssm_multipliers": vec![1.0; N_SEGMENTS],
        "pad_token_id": config.padding_idx,
    }))
}

#[cfg(test)]
mod tests {
    use super::super::{read_config, write_config};
    use super::*;
    use crate::names::Family;
    use flowhn_attn::Rope;
    use tch::{Kind, Tensor};

    /// The keys and the kind of numbers that the released models have.
    const TEXT: &str = r#"{
        "architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1", "attention_bias": false, "attention_dropout": 0.0,
        "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375, "attn_layer_indices": null, "bos_token_id": 1,
        "embedding_multiplier": 5.656854249492381, "eos_token_id": 11, "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 2048, "key_multiplier": 0.390625, "lm_head_multiplier": 0.0390625,
        "mamba_chunk_size": 128, "mamba_conv_bias": true, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_ssm": 1536,
        "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 24, "mamba_norm_before_gate": false,
        "mamba_proj_bias": false, "mamba_rms_norm": false, "mamba_use_mlp": true, "max_position_embeddings": 16384,
        "mlp_bias": false, "mlp_expansion_factor": 8, "mlp_multipliers": [0.8838834764831844, 0.5859375],
        "num_attention_heads": 8, "num_hidden_layers": 36, "num_key_value_heads": 2, "num_logits_to_keep": 1, "pad_token_id": 0,
        "projectors_bias": false, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 100000000000.0,
        "ssm_in_multiplier": 1.25, "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.375],
        "ssm_out_multiplier": 0.23570226039551587, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.53.0", "use_cache": true, "vocab_size": 32784
    }"#;

    fn refusal(from: &str, to: &str) -> String {
        assert!(TEXT.contains(from));
        read_config(&TEXT.replace(from, to), 64).unwrap_err().to_string()
    }

    #[test]
    fn a_released_configuration_reads_and_its_multipliers_become_factors() {
        let model = read_config(TEXT, 64).unwrap();
        assert_eq!((model.family, model.ignored.len()), (Family::FalconH1, 0), "{:?}", model.ignored);
        let config = &model.config;
        assert_eq!(config.ssm, SsmShape::Mamba2 { d_inner: 1536, d_state: 128, d_conv: 4, d_head: 64, n_groups: 1 });
        assert_eq!((config.attn.d_q(), config.attn.d_kv(), config.rope), (512, 128, Some(Rope::new(1e11))));
        assert_eq!((config.options.gate_norm, config.options.shared_norm), (GateNorm::None, true));
        assert_eq!((config.padding_idx, config.tie_embeddings, config.options.ssm_out_bias), (Some(0), false, false));

        let factor = |name: &str| model.fold.factor(name);
        assert_eq!(factor("model.embed_tokens.weight"), 5.656854249492381);
        assert_eq!((factor("lm_head.weight"), factor(FINAL_NORM)), (0.0390625, 1.));
        assert_eq!(factor("model.layers.3.self_attn.k_proj.weight"), 0.390625);
        assert_eq!(factor("model.layers.3.feed_forward.up_proj.weight"), 1.);
        let n_rows = 2 * 1536 + 2 * 128 + 24;
        let ones = Tensor::ones([n_rows, 1], (Kind::Float, tch::Device::Cpu));
        let rows = model.fold.apply("model.layers.3.mamba.in_proj.weight", &ones).unwrap();
        let row = |idx: i64| rows.double_value(&[idx, 0]);
        assert_eq!([row(0), row(1536), row(3 * 1024), row(3 * 1024 + 128), row(n_rows - 1)], {
            [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.375].map(|factor| 1.25 * factor)
        });
    }

    #[test]
    fn rotary_positions_as_transformers_5_writes_them() {
        let nested = |parameters: &str| {
            TEXT.replace("\"rope_theta\": 100000000000.0", &format!("\"rope_parameters\": {parameters}"))
        };
        let model = read_config(&nested(r#"{"rope_theta": 500.0, "rope_type": "default"}"#), 64).unwrap();
        assert_eq!((model.config.rope, model.ignored.len()), (Some(Rope::new(500.)), 0));
        for (parameters, want) in [
            (r#"{"rope_theta": 500.0, "rope_type": "yarn"}"#, "`rope_type` is \"yarn\""),
            (r#"{"rope_theta": 500.0, "factor": 2.0}"#, "`rope_parameters` has factor"),
            ("[1]", "`rope_parameters` is [1], expected an object"),
        ] {
            let message = read_config(&nested(parameters), 64).unwrap_err().to_string();
            assert!(message.contains(want), "{message}");
        }
    }

    #[test]
    fn a_tied_head_keeps_the_embeddings_factor_and_the_norm_makes_up_for_it() {
        let tied = TEXT.replace("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
        let model = read_config(&tied, 64).unwrap();
        assert!(model.config.tie_embeddings);
        assert_eq!(model.fold.factor(FINAL_NORM), 0.0390625 / 5.656854249492381);
        assert_eq!(model.fold.factor("lm_head.weight"), 1.);
    }

    #[test]
    fn what_is_written_has_ones_and_reads_back_the_same() {
        let sizes =
            "\"mamba_n_groups\": 4, \"mamba_rms_norm\": true, \"projectors_bias\": true, \"pad_token_id\": null, ";
        for norm_first in [true, false] {
            let text = r#"{"model_type": "falcon_h1", "hidden_size": 40, "num_hidden_layers": 2, "vocab_size": 50, "#
                .to_owned()
                + &format!("{sizes}\"mamba_norm_before_gate\": {norm_first}, ")
                + r#""intermediate_size": 33, "mamba_n_heads": 8, "mamba_d_ssm": null, "num_attention_heads": 5,
                    "num_key_value_heads": null, "rope_theta": 500.0}"#;
            let model = read_config(&text, 16).unwrap();
            assert!(model.fold.is_empty() && model.ignored.is_empty());
            assert_eq!(
                (model.config.ssm.d_inner(), model.config.attn.n_kv_heads, model.config.norm_groups),
                (80, 5, 4)
            );
            assert_eq!(model.config.options.gate_norm == GateNorm::BeforeGate, norm_first);
            let (family, json) = write_config(&model.config).unwrap();
            assert_eq!(family, Family::FalconH1);
            let back = read_config(&json.to_string(), 16).unwrap();
            assert!(back.fold.is_empty() && back.ignored.is_empty(), "{:?}", back.ignored);
            assert_eq!(back.config, model.config);
        }
    }

    #[test]
    fn values_that_are_not_computed_are_named() {
        for (from, to, want) in [
            ("\"silu\"", "\"gelu\"", "`hidden_act` is \"gelu\""),
            ("\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"linear\"}", "`rope_scaling`"),
            ("\"attention_dropout\": 0.0", "\"attention_dropout\": 0.5", "`attention_dropout` is 0.5"),
            ("\"mamba_use_mlp\": true", "\"time_step_limit\": [0.1, 0.5]", "`time_step_limit` is [0.1,0.5]"),
            ("\"mamba_n_heads\": 24", "\"mamba_n_heads\": 12", "`mamba_n_heads` times `mamba_d_head` is 768"),
            ("\"key_multiplier\": 0.390625", "\"key_multiplier\": 0.0", "`key_multiplier` has 0"),
            (
                "0.5859375]",
                "0.5859375, 1.0]",
                "`mlp_multipliers` is [0.8838834764831844,0.5859375,1.0], expected 2 numbers",
            ),
        ] {
            let message = refusal(from, to);
            assert!(message.contains(want), "{message}");
        }
    }

    #[test]
    fn what_the_family_lacks_is_named() {
        let config = read_config(TEXT, 64).unwrap().config;
        let refused = |change: fn(&mut ModelConfig)| {
            let mut config = config.clone();
            change(&mut config);
            write_config(&config).unwrap_err().to_string()
        };
        assert!(refused(|config| config.options.shared_norm = false).contains("model.shared_norm"));
        assert!(refused(|config| config.fusion = Fusion::Mean).contains("model.fusion"));
        assert!(refused(|config| config.rope = None).contains("model.attn.rope"));
        assert!(refused(|config| config.d_ff = 0).contains("model.d_ff"));
        assert!(refused(|config| config.options.window = Some(8)).contains("model.attn.window"));
        assert!(refused(|config| config.options.mixer_norms = true).contains("model.mixer_norms"));
        let norm_groups = refused(|config| {
            config.options.gate_norm = GateNorm::AfterGate;
            config.norm_groups = 2;
        });
        assert!(norm_groups.contains("model.ssm.norm_groups"), "{norm_groups}");
    }
}
