"""Checkpoints between transformers and FlowHN, both ways, on tiny random models and a CPU.

    python roundtrip.py TARGET/debug/flowhn

`cargo xtask check hf` runs it in an environment with transformers 4.57.6 and torch 2.11.0. What is checked:

- a model saved by transformers, whole or in shards, is imported, and exported again with the same weights and logits; where the family has
  multipliers, which become factors of the weights, with the same logits, and further exports with the same weights;
- logits, gradients and one step of the optimiser that transformers computes from an exported model are those of `flowhn golden`;
- a model trained here is exported, loaded by transformers, and imported again with the same weights;
- missing, left-over and misshapen tensors, and values of config.json that are not supported, are refused by name.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

REPO = Path(__file__).resolve().parents[4]
sys.path.insert(0, str(REPO / "crates/flowhn-model/tests/golden"))
import make  # noqa: E402

FLOWHN = Path(sys.argv[1]).resolve()


def flowhn(*args, refused=None):
    """Runs the program; with `refused` it must fail with one message that says all of these."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([FLOWHN, *map(str, args)], cwd=REPO, env=env, capture_output=True, text=True, check=False)
    if refused is None:
        assert done.returncode == 0, f"{args}: {done.stderr}"
    else:
        assert done.returncode == 1 and all(word in done.stderr for word in refused), f"{args}: {done.stderr}"
    return done.stdout


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def load(path):
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def has_ones(config):
    """Whether all multipliers of a configuration are 1, as where there are none."""
    values = [value for key, value in config.to_dict().items() if key.endswith(("_multiplier", "_multipliers"))]
    return all(number == 1.0 for value in values for number in (value if isinstance(value, list) else [value]))


def equal_to_golden(model, shape, file):
    make.record(model.train(), shape, file)
    row = json.loads(flowhn("golden", "--json", file))[0]
    assert row["pass"], row


def saved_by_transformers(name, folder):
    model = make.random_model(name)
    ids = torch.randint(0, model.config.vocab_size, (2, 11))
    shards = {"max_shard_size": "8KB"} if name.startswith("jamba") else {}
    if name == "mamba2_one_group_tied":
        # This version refuses to save a Mamba-2 whose head is tied, though it makes one.
        model.config.save_pretrained(folder / "theirs")
        weights = {key: weight.clone() for key, weight in model.state_dict().items()}
        save_file(weights, folder / "theirs/model.safetensors", {"format": "pt"})
    else:
        model.save_pretrained(folder / "theirs", **shards)
    assert (folder / "theirs/model.safetensors.index.json").exists() == bool(shards)
    flowhn("import", "--from", folder / "theirs", "--out", folder / "run")
    flowhn("export", "--checkpoint", folder / "run", "--to", folder / "back")
    back = load(folder / "back")
    if not has_ones(model.config):
        # The export has other weights than the model, and the gradients of both are to be right.
        assert has_ones(back.config)
        want = logits(model, ids)
        assert (logits(back, ids) - want).abs().max() <= 1e-5 * want.abs().max()
        equal_to_golden(model, make.CASES[name][1], folder / "multiplied.safetensors")
        flowhn("import", "--from", folder / "back", "--out", folder / "again")
        flowhn("export", "--checkpoint", folder / "again", "--to", folder / "twice")
        model = load(folder / "twice")
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, back.state_dict()[key]), key
    assert torch.equal(logits(model, ids), logits(back, ids))
    equal_to_golden(back, make.CASES[name][1], folder / f"{name}.safetensors")


def trained_here(row, folder):
    flowhn(
        "train", "-c", REPO / f"configs/{row}.toml", "--run-dir", folder / "run", "--set", "train.steps=2",
        "--set", "train.eval_batches=1", "--set", "model.vocab_size=4096", "--set", f"data.cache_dir={folder / 'cache'}",
    )
    flowhn("export", "--checkpoint", folder / "run", "--to", folder / "theirs")
    assert (folder / "theirs/tokenizer.json").exists()
    flowhn("import", "--from", folder / "theirs", "--out", folder / "again")
    weights = [load_file(next(folder.glob(f"{run}/checkpoints/step-*/model.safetensors"))) for run in ("run", "again")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][key]) for key, weight in weights[0].items())
    flowhn("generate", "--checkpoint", folder / "again", "--prompt", "The history", "--max-tokens", 3)
    model = load(folder / "theirs")
    # Initial weights are small; larger ones show differences.
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() > 1 and "A_log" not in key:
                weight.mul_(2.0)
    equal_to_golden(model, (2, 37), folder / "trained.safetensors")


def refused_by_name(folder):
    make.random_model("llama_biases_mqa").save_pretrained(folder / "good")
    weights = load_file(folder / "good/model.safetensors")
    config = json.loads((folder / "good/config.json").read_text())

    def attempt(change, words):
        bad = folder / "bad"
        bad.mkdir(exist_ok=True)
        tensors, keys = dict(weights), dict(config)
        change(tensors, keys)
        save_file(tensors, bad / "model.safetensors", {"format": "pt"})
        (bad / "config.json").write_text(json.dumps(keys))
        flowhn("import", "--from", bad, "--out", folder / "run", refused=words)

    norm, bias = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.bias"
    attempt(lambda tensors, _: (tensors.pop(norm), tensors.pop(bias)), ["missing", norm, bias])
    attempt(lambda tensors, _: tensors.update(extra=torch.zeros(2)), ["left over", "extra"])
    attempt(lambda tensors, _: tensors.update({norm: torch.zeros(5)}), ["wrong shape", norm, "[5]", "[12]"])
    attempt(lambda _, keys: keys.update(hidden_act="gelu"), ["hidden_act", "gelu"])
    attempt(lambda _, keys: keys.update(rope_scaling={"rope_type": "yarn", "factor": 2.0}), ["rope_scaling", "yarn", "llama3"])
    attempt(lambda _, keys: keys.update(model_type="gpt2"), ["gpt2", "llama, mamba, mamba2, jamba and falcon_h1"])
    (folder / "empty").mkdir()
    (folder / "empty/config.json").write_text(json.dumps(config))
    flowhn("import", "--from", folder / "empty", "--out", folder / "run", refused=["model.safetensors"])
    assert not (folder / "run").exists(), "what is refused leaves nothing behind"


def main():
    cases = [(f"saved by transformers: {name}", saved_by_transformers, name) for name in make.CASES]
    rows = [f"paper/tiny/{row}" for row in ("llama", "mamba1", "mamba2", "jamba", "shm")] + ["falcon_h1/tiny"]
    cases += [(f"trained here: {row}", trained_here, row) for row in rows]
    for title, check, *args in [*cases, ("refused by name", refused_by_name)]:
        with tempfile.TemporaryDirectory() as folder:
            check(*args, Path(folder))
        print(f"ok: {title}", flush=True)


if __name__ == "__main__":
    main()
