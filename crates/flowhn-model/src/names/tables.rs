//! The tables, one a family. Names are those of the state dicts: of the script published with arXiv 2505.19472, and of
//! `LlamaForCausalLM`, `MambaForCausalLM`, `Mamba2ForCausalLM`, `JambaForCausalLM` and `FalconH1ForCausalLM` in transformers 4.57.

use super::{Family, NameTable};

pub(super) fn of(family: Family) -> &'static NameTable {
    match family {
        Family::Released => &RELEASED,
        Family::Llama => &LLAMA,
        Family::Mamba => &MAMBA,
        Family::Mamba2 => &MAMBA2,
        Family::Jamba => &JAMBA,
        Family::FalconH1 => &FALCON_H1,
    }
}

const RELEASED: NameTable = NameTable {
    title: "models of the released script, of which only those with Mamba-1 can be loaded,",
    outer: &[
        ("embed.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.final_layernorm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
    layers: "model.layers.",
    parts: &[
        ("attn.norm.", &["atten.input_layernorm."]),
        ("attn.mlp.norm.", &["atten.pre_ff_layernorm."]),
        ("attn.mlp.gate_up_proj.", &["atten.feed_forward.gate_proj.", "atten.feed_forward.up_proj."]),
        ("attn.mlp.", &["atten.feed_forward."]),
        ("attn.mixer.qkv_proj.", &["atten.self_attn.q_proj.", "atten.self_attn.k_proj.", "atten.self_attn.v_proj."]),
        ("attn.mixer.o_proj.", &["atten.self_attn.o_proj."]),
        ("ssm.norm.", &["mamba.input_layernorm."]),
        ("ssm.mlp.norm.", &["mamba.pre_ff_layernorm."]),
        ("ssm.mlp.gate_up_proj.", &["mamba.feed_forward.gate_proj.", "mamba.feed_forward.up_proj."]),
        ("ssm.mlp.", &["mamba.feed_forward."]),
        ("ssm.mixer.dt_norm.", &["mamba.mamba.dt_layernorm."]),
        ("ssm.mixer.b_norm.", &["mamba.mamba.b_layernorm."]),
        ("ssm.mixer.c_norm.", &["mamba.mamba.c_layernorm."]),
        ("ssm.mixer.", &["mamba.mamba."]),
        ("fusion.branch_proj.", &["branch_proj."]),
        ("final_norm.", &["pre_ff_layernorm."]),
        ("final_proj.", &["final_proj."]),
    ],
};

const LLAMA: NameTable = NameTable {
    title: "Llama models",
    outer: &[
        ("embed.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
    layers: "model.layers.",
    parts: &[
        ("attn.norm.", &["input_layernorm."]),
        ("attn.mixer.qkv_proj.", &["self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."]),
        ("attn.mixer.o_proj.", &["self_attn.o_proj."]),
        ("mlp.norm.", &["post_attention_layernorm."]),
        ("mlp.gate_up_proj.", &["mlp.gate_proj.", "mlp.up_proj."]),
        ("mlp.down_proj.", &["mlp.down_proj."]),
    ],
};

/// What a Mamba of either kind has outside its mixers.
const MAMBA_OUTER: &[(&str, &str)] = &[
    ("embed.weight", "backbone.embeddings.weight"),
    ("norm.weight", "backbone.norm_f.weight"),
    ("lm_head.weight", "lm_head.weight"),
];

const MAMBA: NameTable = NameTable {
    title: "Mamba models",
    outer: MAMBA_OUTER,
    layers: "backbone.layers.",
    parts: &[
        ("ssm.norm.", &["norm."]),
        ("ssm.mixer.in_proj.", &["mixer.in_proj."]),
        ("ssm.mixer.conv1d.", &["mixer.conv1d."]),
        ("ssm.mixer.x_proj.", &["mixer.x_proj."]),
        ("ssm.mixer.dt_proj.", &["mixer.dt_proj."]),
        ("ssm.mixer.A_log", &["mixer.A_log"]),
        ("ssm.mixer.D", &["mixer.D"]),
        ("ssm.mixer.out_proj.", &["mixer.out_proj."]),
    ],
};

const MAMBA2: NameTable = NameTable {
    title: "Mamba-2 models",
    outer: MAMBA_OUTER,
    layers: "backbone.layers.",
    parts: &[
        ("ssm.norm.", &["norm."]),
        ("ssm.mixer.in_proj.", &["mixer.in_proj."]),
        ("ssm.mixer.conv1d.", &["mixer.conv1d."]),
        ("ssm.mixer.dt_bias", &["mixer.dt_bias"]),
        ("ssm.mixer.A_log", &["mixer.A_log"]),
        ("ssm.mixer.D", &["mixer.D"]),
        ("ssm.mixer.norm.", &["mixer.norm."]),
        ("ssm.mixer.out_proj.", &["mixer.out_proj."]),
    ],
};

/// What Jamba and Falcon-H1 have outside their blocks.
const HYBRID_OUTER: &[(&str, &str)] = &[
    ("embed.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.final_layernorm.weight"),
    ("lm_head.weight", "lm_head.weight"),
];

const JAMBA: NameTable = NameTable {
    title: "Jamba models",
    outer: HYBRID_OUTER,
    layers: "model.layers.",
    parts: &[
        ("attn.norm.", &["input_layernorm."]),
        (
            "attn.mixer.qkv_proj.weight",
            &["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        ),
        ("attn.mixer.o_proj.weight", &["self_attn.o_proj.weight"]),
        ("ssm.norm.", &["input_layernorm."]),
        ("ssm.mixer.dt_norm.", &["mamba.dt_layernorm."]),
        ("ssm.mixer.b_norm.", &["mamba.b_layernorm."]),
        ("ssm.mixer.c_norm.", &["mamba.c_layernorm."]),
        ("ssm.mixer.", &["mamba."]),
        ("mlp.norm.", &["pre_ff_layernorm."]),
        ("mlp.gate_up_proj.weight", &["feed_forward.gate_proj.weight", "feed_forward.up_proj.weight"]),
        ("mlp.down_proj.weight", &["feed_forward.down_proj.weight"]),
    ],
};

const FALCON_H1: NameTable = NameTable {
    title: "Falcon-H1 models",
    outer: HYBRID_OUTER,
    layers: "model.layers.",
    parts: &[
        ("norm.", &["input_layernorm."]),
        ("attn.mixer.qkv_proj.", &["self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."]),
        ("attn.mixer.o_proj.", &["self_attn.o_proj."]),
        ("ssm.mixer.", &["mamba."]),
        ("mlp.norm.", &["pre_ff_layernorm."]),
        ("mlp.gate_up_proj.", &["feed_forward.gate_proj.", "feed_forward.up_proj."]),
        ("mlp.down_proj.", &["feed_forward.down_proj."]),
    ],
};
