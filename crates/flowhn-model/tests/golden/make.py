"""Writes golden files of Llama, Mamba, Mamba-2, Jamba and Falcon-H1 models with uncommon shapes: tiny random models run by transformers
4.57.6 on torch 2.11.0, float32, CPU.

    pip install torch==2.11.0 transformers==4.57.6 safetensors && python make.py [FOLDER [CASE...]]

Without arguments it writes the cases of SHIPPED beside itself; with a folder all cases, or those named, into it. The files that ship are
of 4.49.0, but for Falcon-H1's, which that version does not have, and `llama_scaled_positions`; groups of Mamba-2 are strided in `mamba2_strided_biases` of that version
and contiguous since 4.52.

One safetensors file a case; the metadata key `config` is the model's config.json. Keys: input_ids, logits, loss (mean next-token
cross-entropy), hidden.i (as transformers returns them: what enters each block, in the two Mambas what leaves each block; the last after
the final norm), w.NAME (weights), g.NAME (gradients of
the loss), s.NAME (weights after one AdamW step: lr 1e-3, betas 0.9 and 0.95, eps 1e-8, decay 0.1 on every tensor).
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

# Small enough to ship: each is below 100 KB.
SHIPPED = ["llama_biases_mqa", "mamba_untied_biases", "mamba2_one_group_tied", "mamba2_strided_biases", "jamba_offset_biases"]
SHIPPED += ["falcon_h1_multipliers", "falcon_h1_norm_before_gate", "llama_scaled_positions"]


def llama(**sizes):
    small = dict(vocab_size=53, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1)
    return LlamaForCausalLM(LlamaConfig(**{**small, **sizes}))


def mamba(**sizes):
    small = dict(vocab_size=53, hidden_size=12, state_size=5, num_hidden_layers=2, conv_kernel=4, expand=2, use_cache=False)
    return MambaForCausalLM(MambaConfig(**{**small, **sizes}))


def mamba2(**sizes):
    small = dict(
        vocab_size=53, hidden_size=12, state_size=6, num_hidden_layers=2, conv_kernel=4, expand=2, num_heads=6, head_dim=4, n_groups=1,
        chunk_size=8, use_cache=False,
    )
    return Mamba2ForCausalLM(Mamba2Config(**{**small, **sizes}))


def jamba(**sizes):
    small = dict(
        vocab_size=53, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
        num_experts=1, num_experts_per_tok=1, attn_layer_period=3, attn_layer_offset=0, mamba_d_state=5, mamba_d_conv=4, mamba_expand=2,
        mamba_dt_rank=3, use_mamba_kernels=False,
    )
    return JambaForCausalLM(JambaConfig(**{**small, **sizes}))


# Multipliers as far apart as those of the released models, none a power of two.
MULTIPLIERS = dict(
    embedding_multiplier=5.7, lm_head_multiplier=0.07, attention_in_multiplier=1.3, attention_out_multiplier=0.55, key_multiplier=0.39,
    mlp_multipliers=[0.88, 0.59], ssm_in_multiplier=1.25, ssm_out_multiplier=0.24, ssm_multipliers=[0.35, 0.3, 0.45, 0.6, 0.7],
)


def falcon_h1(**sizes):
    small = dict(
        vocab_size=37, hidden_size=12, intermediate_size=14, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=4,
        mamba_d_ssm=24, mamba_n_heads=6, mamba_d_head=4, mamba_n_groups=1, mamba_d_state=6, mamba_chunk_size=8, rope_theta=500.0,
    )
    return FalconH1ForCausalLM(FalconH1Config(**{**small, **sizes}))


# Case: the model and the shape of its input.
CASES = {
    "llama_biases_mqa": (lambda: llama(attention_bias=True, mlp_bias=True, rope_theta=500.0), (2, 13)),
    "llama_tied": (lambda: llama(tie_word_embeddings=True, num_attention_heads=2, num_key_value_heads=2, pad_token_id=3), (1, 17)),
    "llama_wide_heads": (lambda: llama(head_dim=10, num_hidden_layers=3, rms_norm_eps=1e-5), (3, 7)),
    "llama_heads_of_two": (lambda: llama(hidden_size=24, num_attention_heads=6, num_key_value_heads=3, head_dim=2), (2, 1 + 64)),
    "llama_scaled_positions": (
        lambda: llama(
            head_dim=8, rope_theta=500.0, max_position_embeddings=256,
            rope_scaling=dict(
                rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64,
            ),
        ),
        (2, 29),
    ),
    "llama_stretched_positions": (lambda: llama(rope_scaling=dict(rope_type="linear", factor=2.5)), (1, 23)),
    "mamba_untied_biases": (lambda: mamba(use_bias=True, tie_word_embeddings=False, conv_kernel=3, time_step_rank=2), (2, 13)),
    "mamba_no_conv_bias": (lambda: mamba(use_conv_bias=False, state_size=16, time_step_rank=5, conv_kernel=2), (1, 31)),
    "mamba_expand": (lambda: mamba(expand=1.5, layer_norm_epsilon=1e-6, conv_kernel=5, hidden_size=20), (3, 5)),
    "mamba_auto_rank": (lambda: mamba(hidden_size=40, state_size=1), (2, 11)),
    "mamba2_one_group_tied": (lambda: mamba2(tie_word_embeddings=True), (2, 13)),
    "mamba2_strided_biases": (lambda: mamba2(n_groups=2, use_bias=True, conv_kernel=3), (2, 21)),
    "mamba2_three_groups": (lambda: mamba2(n_groups=3, num_heads=6, use_conv_bias=False, state_size=3), (1, 29)),
    "mamba2_group_a_head": (lambda: mamba2(n_groups=4, num_heads=4, head_dim=6, chunk_size=64), (2, 7)),
    "mamba2_one_head": (lambda: mamba2(num_heads=1, head_dim=24, conv_kernel=2, expand=2), (3, 16)),
    "jamba_offset_biases": (lambda: jamba(mamba_proj_bias=True, attn_layer_offset=1, num_hidden_layers=2, hidden_size=9), (2, 13)),
    "jamba_period_four": (
        lambda: jamba(num_hidden_layers=6, attn_layer_period=4, attn_layer_offset=2, mamba_conv_bias=False, tie_word_embeddings=True),
        (1, 19),
    ),
    "jamba_attention_only": (lambda: jamba(attn_layer_period=1, attn_layer_offset=0, num_key_value_heads=3), (2, 9)),
    "jamba_experts_elsewhere": (
        lambda: jamba(num_experts=4, expert_layer_period=9, expert_layer_offset=8, mamba_expand=3, mamba_d_conv=2, mamba_dt_rank="auto"),
        (2, 33),
    ),
    "jamba_scan_only": (lambda: jamba(attn_layer_period=9, attn_layer_offset=8, mamba_d_state=16, pad_token_id=7), (1, 12)),
    "falcon_h1_plain": (lambda: falcon_h1(), (2, 13)),
    "falcon_h1_multipliers": (
        lambda: falcon_h1(
            **MULTIPLIERS, attention_bias=True, mlp_bias=True, mamba_proj_bias=True, projectors_bias=True, head_dim=6,
        ),
        (2, 13),
    ),
    "falcon_h1_norm_before_gate": (
        lambda: falcon_h1(
            **MULTIPLIERS, mamba_rms_norm=True, mamba_n_groups=2, tie_word_embeddings=True, mamba_proj_bias=True, pad_token_id=3,
        ),
        (2, 21),
    ),
    "falcon_h1_norm_after_gate": (
        lambda: falcon_h1(
            **MULTIPLIERS, mamba_rms_norm=True, mamba_norm_before_gate=False, mamba_n_groups=3, mamba_conv_bias=False, projectors_bias=True,
            rms_norm_eps=1e-6, num_hidden_layers=3,
        ),
        (1, 29),
    ),
    "falcon_h1_tied_alike": (
        lambda: falcon_h1(
            tie_word_embeddings=True, embedding_multiplier=3.0, lm_head_multiplier=3.0, mamba_rms_norm=True, mamba_n_groups=1, pad_token_id=None,
        ),
        (3, 7),
    ),
    "falcon_h1_odd_sizes": (
        lambda: falcon_h1(
            **MULTIPLIERS, hidden_size=15, intermediate_size=21, mamba_d_ssm=None, mamba_expand=3, mamba_n_heads=5, mamba_d_head="auto",
            mamba_n_groups=5, mamba_d_state=3, mamba_d_conv=3, mamba_rms_norm=True, mamba_norm_before_gate=False, head_dim=10,
            num_attention_heads=2, num_key_value_heads=2, mamba_chunk_size=64,
        ),
        (2, 37),
    ),
}


def random_model(name):
    """The model of a case, with weights that leave nothing near 0 or 1."""
    torch.manual_seed(sum(map(ord, name)))
    model = CASES[name][0]().train()
    for key, weight in model.named_parameters():
        if weight.dim() > 1 and not key.endswith("A_log"):
            torch.nn.init.normal_(weight, std=0.15 if "embed" in key or "lm_head" in key else 0.3)
        elif "norm" in key or key.endswith(".D"):
            torch.nn.init.normal_(weight, mean=1.0, std=0.2)
        elif "bias" in key:
            torch.nn.init.normal_(weight, mean=-1.0 if "dt" in key else 0.0, std=0.3)
    return model


def record(model, shape, file):
    """Runs the model on random ids and writes a golden file. Its weights move by one step."""
    ids = torch.randint(0, model.config.vocab_size, shape)
    ids[0, 0] = model.config.pad_token_id or 0
    outputs = model(input_ids=ids, labels=ids, output_hidden_states=True, use_cache=False)
    outputs.loss.backward()
    tensors = {"input_ids": ids, "logits": outputs.logits, "loss": outputs.loss.reshape(1)}
    tensors |= {f"hidden.{i}": hidden for i, hidden in enumerate(outputs.hidden_states)}
    weights = dict(model.named_parameters())
    tensors |= {f"w.{key}": weight.clone() for key, weight in weights.items()}
    tensors |= {f"g.{key}": weight.grad.clone() for key, weight in weights.items()}
    torch.optim.AdamW(weights.values(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1).step()
    tensors |= {f"s.{key}": weight for key, weight in weights.items()}
    tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    metadata = {
        "config": json.dumps(model.config.to_dict()),
        "made_by": "crates/flowhn-model/tests/golden/make.py",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    save_file(tensors, file, metadata)
    print(f"{file.name}: loss {outputs.loss.item():.4f}, {file.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for case in sys.argv[2:] or (CASES if len(sys.argv) > 1 else SHIPPED):
        record(random_model(case), CASES[case][1], folder / f"{case}.safetensors")
