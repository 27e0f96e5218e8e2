"""Writes the golden files beside it: one mixer each, run by transformers 4.49.0 on torch 2.11.0, float32, CPU.

    pip install torch==2.11.0 transformers==4.49.0 safetensors && python make.py

Keys: x, y, grad.y (the gradient fed in), grad.x, and per parameter `name` and `grad.name`, under flowhn-ssm's names.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.models.jamba.configuration_jamba import JambaConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.configuration_mamba import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

RENAMED = {"dt_layernorm.weight": "dt_norm.weight", "b_layernorm.weight": "b_norm.weight", "c_layernorm.weight": "c_norm.weight"}


def write(name, mixer, seq_len, config):
    torch.manual_seed(0)
    for key, weight in mixer.named_parameters():
        if weight.dim() > 1 and key != "A_log":
            torch.nn.init.normal_(weight, std=0.3)
        elif "norm" in key or key == "D":
            torch.nn.init.normal_(weight, mean=1.0, std=0.2)
        elif "bias" in key:
            torch.nn.init.normal_(weight, mean=-1.0, std=0.5)
    x = torch.randn(2, seq_len, config["d_model"], requires_grad=True)
    y = mixer(x)
    y = y[0] if isinstance(y, tuple) else y
    grad_y = torch.randn_like(y)
    y.backward(grad_y)

    tensors = {"x": x.detach(), "y": y.detach(), "grad.y": grad_y, "grad.x": x.grad}
    for key, weight in mixer.named_parameters():
        ours = RENAMED.get(key, key)
        for prefix, value in (("", weight.detach()), ("grad.", weight.grad)):
            tensors[prefix + ours] = value.squeeze(1) if ours == "conv1d.weight" else value
    metadata = {
        "config": json.dumps(config),
        "made_by": "crates/flowhn-ssm/tests/golden/make.py",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
    save_file(tensors, Path(__file__).parent / f"{name}.safetensors", metadata)


def interleave_groups():
    """Makes the plain Mamba-2 of this version give head h group h // (heads / groups), as mamba_ssm, its own CUDA path and later
    versions do; unpatched it gives group h % groups."""
    plain = torch.Tensor.repeat

    def repeat(self, *sizes):
        if self.dim() == 4 and len(sizes) == 4 and sizes[:2] == (1, 1) and sizes[3] == 1:
            return self.repeat_interleave(sizes[2], dim=2)
        return plain(self, *sizes)

    torch.Tensor.repeat = repeat


mamba1 = dict(d_model=16, d_inner=24, d_state=8, d_conv=4, dt_rank=3)
write(
    "mamba1",
    MambaMixer(
        MambaConfig(hidden_size=16, intermediate_size=24, state_size=8, conv_kernel=4, time_step_rank=3, expand=1.5), 0
    ),
    21,
    mamba1,
)
write(
    "jamba",
    JambaMambaMixer(
        JambaConfig(
            hidden_size=16, mamba_expand=2, mamba_d_state=8, mamba_d_conv=4, mamba_dt_rank=3, rms_norm_eps=1e-6,
            use_mamba_kernels=False,
        ),
        0,
    ),
    21,
    dict(mamba1, d_inner=32, inner_norm_eps=1e-6),
)
interleave_groups()
write(
    "mamba2",
    Mamba2Mixer(
        Mamba2Config(
            hidden_size=16, num_heads=4, head_dim=8, expand=2, state_size=6, n_groups=2, conv_kernel=4, chunk_size=8,
            layer_norm_epsilon=1e-5, rms_norm=True,
        ),
        0,
    ),
    21,
    dict(d_model=16, n_heads=4, d_head=8, d_state=6, n_groups=2, d_conv=4, chunk_len=8, norm_eps=1e-5, norm_groups=1),
)
