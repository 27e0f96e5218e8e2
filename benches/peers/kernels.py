#!/usr/bin/env python3
"""Times the public Python kernels at the shapes of `flowhn bench kernels`, in its way.

    python3 benches/peers/kernels.py                        every operation below, one JSON object a line
    python3 benches/peers/kernels.py "ssd B8 L4096 24x64 N128"
    flowhn bench kernels --device cuda --peers python3      in turns with ours: started with --serve, asked by name on its input

Needs torch with CUDA. mamba-ssm (its Triton part is enough, see README.md), causal-conv1d, flash-linear-attention and liger-kernel are
timed where they are installed; where one is not, the output says so. A time is that of CUDA events around one call, the L2 cache
cleared before it and the host ahead of the GPU; `backward` runs on a graph that is recorded once and kept.
"""

import argparse
import json
import re
import sys
import time

import torch
import torch.nn.functional as F

NAMES = [
    "selective_scan B8 L4096 D1536 N16",
    "selective_scan B8 L4096 D2048 N16",
    "selective_scan B8 L4096 D4096 N16",
    "ssd B8 L4096 24x64 N128",
    "ssd B8 L4096 32x64 N128",
    "ssd B4 L4096 64x64 N128",
    "ssd B32 L512 24x64 N128",
    "causal_conv1d B8 L4096 D1792 K4",
    "gated_rms_norm 32768x1536",
    "rms_norm 32768x768",
    "rms_norm 16384x2048",
    "swiglu 32768x4096",
    "linear_cross_entropy 32768x768 V65536",
    "linear_cross_entropy 16384x2048 V65536",
    "attention B8 T4096 12x64",
    "attention B8 T4096 16x128",
    "attention B32 T1024 12/3x64",
    "attention B64 T512 12/3x64",
]

BF16, F32 = torch.bfloat16, torch.float32
FLUSH_BYTES, N_FLUSHES, WARM_UP = 256 << 20, 8, 3


def random(*shape, dtype=BF16, scale=1.0):
    """Values in -1..1 that want a gradient."""
    values = (torch.rand(*shape, device="cuda", dtype=F32) * 2 - 1) * scale
    return values.to(dtype).requires_grad_()


class Timer:
    def __init__(self, n):
        self.n = n
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def time(self, call):
        for _ in range(WARM_UP):
            call()
        device_us = []
        for _ in range(self.n):
            for _ in range(N_FLUSHES):
                self.flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            device_us.append(1e3 * start.elapsed_time(end))
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(self.n):
            call()
        torch.cuda.synchronize()
        return {"device_us": device_us, "wall_us": 1e6 * (time.perf_counter() - began) / self.n}


def both_ways(timer, run, leaves):
    """Times of the forward and of the backward of `run`, a function without arguments that returns a tensor."""
    yield {"pass": "forward", **timer.time(run)}
    out = run()
    grad = random(*out.shape, dtype=out.dtype).detach()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    yield {"pass": "backward", **timer.time(lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True))}


def in_one(timer, loss, leaves):
    """The time of a loss with its gradients."""
    yield {"pass": "both", **timer.time(lambda: torch.autograd.grad(loss(), leaves))}


def scan_mamba(timer, b, l, d, n):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    # Its own layout: channels before tokens.
    u, delta, z = (random(b, d, l) for _ in range(3))
    rates = (-torch.rand(d, n, device="cuda") - 0.1).requires_grad_()
    B, C = (random(b, 1, n, l) for _ in range(2))
    skip, bias = random(d, dtype=F32), random(d, dtype=F32)
    run = lambda: selective_scan_fn(u, delta, rates, B, C, skip, z=z, delta_bias=bias, delta_softplus=True)
    return both_ways(timer, run, [u, delta, rates, B, C, skip, z, bias])


def ssd_mamba(timer, b, l, h, p, n):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, B, C = random(b, l, h, p), random(b, l, h), random(b, l, 1, n), random(b, l, 1, n)
    rates = (-torch.rand(h, device="cuda") - 0.1).requires_grad_()
    skip, bias = random(h, dtype=F32), random(h, dtype=F32)
    run = lambda: mamba_chunk_scan_combined(x, dt, rates, B, C, 256, D=skip, dt_bias=bias, dt_softplus=True)
    return both_ways(timer, run, [x, dt, rates, B, C, skip, bias])


def ssd_fla(timer, b, l, h, p, n):
    from fla.ops.simple_gla import chunk_simple_gla

    # The same recurrence with the decays given; softplus, skip and the step sizes' product are left out, which favours it.
    x = random(b, l, h, p)
    B, C = random(b, l, 1, n), random(b, l, 1, n)
    decay = (-torch.rand(b, l, h, device="cuda") * 0.1).requires_grad_()
    # It has no groups: every head gets its keys.
    run = lambda: chunk_simple_gla(C.expand(b, l, h, n), B.expand(b, l, h, n), x, g=decay, scale=1.0)[0]
    return both_ways(timer, run, [x, B, C, decay])


def conv_dao(timer, b, l, d, k):
    from causal_conv1d import causal_conv1d_fn

    # Channels last, as a projection makes them.
    x, weight, bias = random(b, l, d), random(d, k, dtype=F32), random(d, dtype=F32)
    run = lambda: causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
    return both_ways(timer, run, [x, weight, bias])


def conv_fla(timer, b, l, d, k):
    from fla.modules.causal_conv1d import causal_conv1d

    x, weight, bias = random(b, l, d), random(d, k), random(d)

    def run():
        out = causal_conv1d(x, weight, bias, activation="silu")
        return out[0] if isinstance(out, tuple) else out

    return both_ways(timer, run, [x, weight, bias])


def gated_norm_mamba(timer, r, d):
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    x, z, weight = random(r, d), random(r, d), random(d, dtype=F32)
    run = lambda: rmsnorm_fn(x, weight, None, z=z, eps=1e-5, group_size=None, norm_before_gate=False)
    return both_ways(timer, run, [x, z, weight])


def norm_torch(timer, r, d):
    x, weight = random(r, d), random(d)
    return both_ways(timer, lambda: F.rms_norm(x, (d,), weight, 1e-5), [x, weight])


def norm_liger(timer, r, d):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    x, weight = random(r, d), random(d)
    # Its backward may otherwise write over the gradient it is given, which cannot be repeated.
    run = lambda: LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", False)
    return both_ways(timer, run, [x, weight])


def swiglu_compiled(timer, r, d):
    def swiglu(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    x, compiled = random(r, d), torch.compile(swiglu, dynamic=False)
    return both_ways(timer, lambda: compiled(x), [x])


def head_inputs(r, d, v):
    x, weight = random(r, d), random(v, d, scale=0.02)
    return x, weight, torch.arange(r, device="cuda") * 7919 % v


def head_liger(timer, r, d, v):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    x, weight, targets = head_inputs(r, d, v)

    def loss():
        out = LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets)
        return out[0] if isinstance(out, tuple) else out

    return in_one(timer, loss, [x, weight])


def head_compiled(timer, r, d, v):
    x, weight, targets = head_inputs(r, d, v)
    whole = torch.compile(lambda: F.cross_entropy((x @ weight.t()).float(), targets), dynamic=False)
    return in_one(timer, whole, [x, weight])


def attention_sdpa(backend):
    def attend(timer, b, t, h, k, p):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, key, value = (random(b, t, heads, p) for heads in (h, k, k))
        heads_first = [tensor.transpose(1, 2) for tensor in (q, key, value)]

        def run():
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=h != k)

        return both_ways(timer, run, [q, key, value])

    return attend


PEERS = {
    "selective_scan": {"mamba-ssm CUDA": scan_mamba},
    "ssd": {"mamba-ssm Triton": ssd_mamba, "flash-linear-attention simple_gla": ssd_fla},
    "causal_conv1d": {"causal-conv1d CUDA": conv_dao, "flash-linear-attention conv": conv_fla},
    "gated_rms_norm": {"mamba-ssm Triton": gated_norm_mamba},
    "rms_norm": {"torch": norm_torch, "liger-kernel": norm_liger},
    "swiglu": {"torch, compiled": swiglu_compiled},
    "linear_cross_entropy": {"liger-kernel": head_liger, "torch, compiled": head_compiled},
    "attention": {
        "torch SDPA, cuDNN": attention_sdpa("CUDNN_ATTENTION"),
        "torch SDPA, flash": attention_sdpa("FLASH_ATTENTION"),
    },
}


def sizes(op, shape):
    """The numbers of a shape in the order in which the functions above take them."""
    numbers = [int(number) for number in re.findall(r"\d+", shape)]
    if op == "attention" and "/" not in shape:
        batch, tokens, heads, width = numbers
        return [batch, tokens, heads, heads, width]
    return numbers


def absence(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"[:300]


def answers(timer, name):
    """What every peer that has the operation takes for it."""
    op, _, shape = name.partition(" ")
    if re.search("[a-z]{2}", shape):
        return []  # Words before the shape make another operation of it: "rms_norm to fp8 8192x2048".
    found = []
    for peer, run in PEERS.get(op, {}).items():
        try:
            # Letters before numbers are the shape's own: K4 is the fourth number of a convolution.
            found += [{"peer": peer, **row} for row in run(timer, *sizes(op, shape))]
        except Exception as error:  # A peer may be absent, too old, or refuse the shape: the others go on.
            found.append({"peer": peer, "absent": absence(error)})
        torch.cuda.empty_cache()
    return found


def summary(name, row):
    times = sorted(row.pop("device_us"))
    row.update(median_us=times[len(times) // 2], min_us=times[0], max_us=times[-1], n=len(times))
    op, _, shape = name.partition(" ")
    return {"op": op, "shape": shape, **row}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="operations with their shapes; all by default")
    parser.add_argument("--n", type=int, default=20, help="calls that are timed")
    parser.add_argument("--serve", action="store_true", help="read names from standard input, answer each with a JSON list")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device")
    torch.manual_seed(0)
    timer = Timer(args.n)
    if args.serve:
        # Libraries print; the answers must stay alone on what was standard output.
        out, sys.stdout = sys.stdout, sys.stderr
        for line in sys.stdin:
            print(json.dumps(answers(timer, line.strip())), file=out, flush=True)
        return
    for name in args.names or NAMES:
        for row in answers(timer, name):
            print(json.dumps(summary(name, row) if "device_us" in row else {"name": name, **row}), flush=True)


if __name__ == "__main__":
    main()
