"""Scores the first items of data/eval with EleutherAI's lm-evaluation-harness, and writes what it finds as a fixture.

    python -m venv venv && venv/bin/pip install "lm-eval[hf]==0.4.13" transformers==4.49.0 torch
    venv/bin/python crates/flowhn-train/tests/harness/make.py

The model is a Llama of transformers whose weights follow from a formula that the test computes as well, so that no weights
are kept. Items go through the harness's own task classes, as local files: it tokenises, batches, scores and judges them.

With `--model DIR --out FILE` the harness scores a model that `flowhn export` wrote, for a comparison with what `flowhn eval
--samples` says of the checkpoint that it came from.
"""

import argparse
import gzip
import json
import sys
import tempfile
import zlib
from pathlib import Path

import lm_eval
import numpy
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]
LIMIT = 8
SEQ_LEN = 256
CONFIG = dict(
    vocab_size=4096,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=SEQ_LEN,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    attention_bias=False,
)


def weight(name, shape):
    """Uniform numbers out of a hash of name and place: about 1 for norms, of a deviation of 1.4 over the root of the width else."""
    x = numpy.arange(numpy.prod(shape), dtype=numpy.uint64) * 2654435761 + zlib.crc32(name.encode())
    x &= 0xFFFFFFFF
    x ^= x >> 15
    x = x * 2246822519 & 0xFFFFFFFF
    x ^= x >> 13
    unit = x.astype(numpy.float64) / 2.0**32 - 0.5
    values = unit * 5 / shape[1] ** 0.5 if len(shape) == 2 else 1 + unit / 4
    return torch.from_numpy(values.astype(numpy.float32).reshape(shape))


def task_config(name, path, items):
    """A task of the harness for a file of ours: the choices lose their leading space, which is the harness's delimiter."""
    shared = {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": " ",
        "metadata": {"version": 0},
    }
    means = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    if "suffix" in items[0]:
        return shared | {
            "output_type": "multiple_choice",
            "doc_to_text": "answer",
            "doc_to_choice": "texts",
            "doc_to_target": "suffix",
            "metric_list": means[:1],
        }
    if len(items[0]["choices"]) == 1:
        perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
        return shared | {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            # No delimiter is put before the target of this type.
            "doc_to_target": "{{' ' + choices[0]}}",
            "metric_list": [means[0], perplexity],
        }
    return shared | {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": means,
    }


def bare(text):
    assert text.startswith(" "), text
    return text[1:]


def for_harness(item):
    if "suffix" in item:
        texts = [item["context"] + choice for choice in item["choices"]]
        return {"texts": texts, "suffix": bare(item["suffix"]), "answer": item["answer"]}
    return {"context": item["context"], "choices": [bare(choice) for choice in item["choices"]], "answer": item["answer"]}


def formula():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name, tuple(parameter.shape)))
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder of transformers instead of the formula's model")
    parser.add_argument("--out", type=Path, default=HERE / "llama.json")
    parser.add_argument("--limit", type=int, default=LIMIT, help="items of each task")
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help="tokens that the model reads at once")
    args = parser.parse_args()
    if args.model and args.out == HERE / "llama.json":
        parser.error("--model needs --out: the fixture is of the formula's model")
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model) if args.model else formula()
    file = args.model / "tokenizer.json" if args.model else ROOT / "data/tiny/tokenizer.json"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")
    model = model.float().eval()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=args.seq_len, batch_size=4, device="cpu")
    tasks = {}
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted((ROOT / "data/eval").glob("*.jsonl.gz")):
            name = path.name.removesuffix(".jsonl.gz")
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                items = [json.loads(line) for line, _ in zip(lines, range(args.limit))]
            local = Path(folder) / f"{name}.jsonl"
            local.write_text("".join(json.dumps(for_harness(item)) + "\n" for item in items))
            tasks[name] = score(harness, task_config(name, local, items))
    fixture = {
        "made_by": f"lm-eval {lm_eval.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__.split('+')[0]}, python {sys.version.split()[0]}",
        "config": json.loads(model.config.to_json_string()),
        "limit": args.limit,
        "tasks": tasks,
    }
    args.out.write_text(json.dumps(fixture) + "\n")


def score(harness, config):
    found = lm_eval.simple_evaluate(
        model=harness, tasks=[config], task_manager=TaskManager(), log_samples=True, bootstrap_iters=2
    )
    (name,) = found["results"]
    numbers = {key.split(",")[0]: value for key, value in found["results"][name].items() if key.endswith(",none")}
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    likelihoods = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    if config["output_type"] == "loglikelihood":
        likelihoods = [[float(sample["filtered_resps"][0][0])] for sample in samples]
    return {
        **{key: numbers[key] for key in ("acc", "acc_norm", "perplexity") if key in numbers},
        **{key: numbers[key] for key in ("acc_stderr", "acc_norm_stderr") if isinstance(numbers.get(key), float)},
        "log_likelihoods": likelihoods,
    }


if __name__ == "__main__":
    main()
