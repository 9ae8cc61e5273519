"""Seconds and peak memory of every pruning stage on a model of some size, beside gradients held the usual way.

    python tests/performance/pruning.py FOLDER --shape 1b
    python tests/performance/pruning.py FOLDER --shape 7b --skip usual --skip "prune, static"
    python tests/performance/pruning.py FOLDER --shape lfm2-1b --tokenizer smollm2  # made by `tailored-llama convert`

A checkpoint of random weights is written into FOLDER/SHAPE (kept, and found again), in bfloat16, layer by layer. Then
each stage runs in a process of its own: the dependency graph, first-order importance on 10 × 64 tokens as in
LLM-Pruner, pruning to the ratio without reconstruction, and with it (static, the same tokens). `usual` computes the
same scores as LLM-Pruner's code does: every weight with a gradient, one backward pass for each sample. Prints a table
and writes FOLDER/pruning.parquet. Peak memory is the process's resident high-water mark, libraries and mapped files
included; `idle` is that of a process that has only loaded the libraries. Of a type of which only tokens leave, they do
so by the tokenizer of another model, down to 16,384.
"""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import CPU, prune
from tailored_llama.config import ReconstructionConfig, Work
from tailored_llama.data import read_calibration
from tailored_llama.data.calibration import CALIBRATION_SCHEMA
from tailored_llama.memory import peak_memory, reset_peak_memory
from tailored_llama.models import copy_tokenizer, load_model, weight_files
from tailored_llama.processes import forking
from tailored_llama.pruning import ImportanceSettings, build_graph, read_groups, score_importance
from tailored_llama.pruning.groups import owners_of
from tailored_llama.pruning.importance import add_scores, read_importance
from tailored_llama.serving import trim_checkpoint
from tailored_llama.store import write_table

SHAPES: dict[str, dict[str, Any]] = {
    # TinyLlama-1.1B: grouped-query attention, untied
    "1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000,
    },
    # LLaMA-7B
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000,
    },
    # OLMo 2 1B, of which tokens and channels leave
    "olmo2-1b": {
        "model_type": "olmo2", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 100352, "pad_token_id": 0,
    },
    # Qwen3.5's text part at 2B: the same, but a hybrid, which is not streamed
    "qwen3_5-2b": {
        "model_type": "qwen3_5_text", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 248320, "pad_token_id": 0,
    },
    # LFM2 1.2B, with SmolLM2's number of tokens: of it, only tokens leave
    "lfm2-1b": {
        "model_type": "lfm2", "hidden_size": 2048, "intermediate_size": 12288, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49152, "pad_token_id": 0,
        "layer_types": ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
    },
}  # fmt: skip
SAMPLES, TOKENS = 10, 64
GENERAL = "What leaves is chosen by how often a text uses it."


def write_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """Random weights, one shard for each layer and one for the rest; in bfloat16, unless the shape has a dtype."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shape = {"dtype": "bfloat16", "model_type": "llama"} | shape
    config = AutoConfig.for_model(**shape, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    torch.manual_seed(0)
    where: dict[str, str] = {}
    for name in shapes:
        layer = name.split(".")[2] if ".layers." in name else "rest"
        where[name] = f"model-{layer}.safetensors"
    for file in dict.fromkeys(where.values()):
        tensors = {}
        for name in (n for n in shapes if where[n] == file):
            tensor = torch.empty(shapes[name], dtype=getattr(torch, shape["dtype"]))
            tensors[name] = tensor.fill_(1) if "norm" in name else tensor.normal_(0, 0.02)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def write_tokens(out: Path, vocabulary: int, samples: int = SAMPLES, tokens: int = TOKENS) -> None:
    out.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(0).integers(vocabulary, size=(samples, tokens))
    columns = {"input_ids": ids.tolist(), "source": ["random"] * samples, "row": range(samples)}
    write_table(out / "calibration.parquet", columns, CALIBRATION_SCHEMA)


def usual(dense: Path, root: Path) -> None:
    """First-order scores with every gradient in memory."""
    model, ids = load_model(dense), read_calibration(root / "tokens")
    weights = dict(model.named_parameters())
    groups = read_groups(root / "graph")
    model.requires_grad_(True)
    for sample in ids:
        (model(input_ids=sample[None], labels=sample[None], use_cache=False).loss / len(ids)).backward()
    scores = torch.zeros(len(groups), dtype=torch.float64)
    for name, (dim, owner) in owners_of(dense).items():
        gradient = weights[name].grad
        assert gradient is not None
        values = (weights[name].detach().float() * gradient.float()).abs()
        add_scores(scores, owner, values.view(len(values), -1).sum(1 - dim))
    np.save(root / "usual.npy", scores.numpy())


def stages(dense: Path, root: Path, ratio: float) -> dict[str, Callable[[], Any]]:
    """What is timed, in order; each finds what the ones before it wrote."""

    def new(name: str) -> Path:
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir()
        return root / name

    def pruned(method: Any) -> Callable[[], Any]:
        fitted, tokens = ReconstructionConfig(method=method), root / "tokens" if method != "none" else None
        folders = dense, root / "graph", root / "importance"
        return lambda: prune(*folders, tokens, ratio=ratio, reconstruction=fitted, out=new(f"pruned-{method}"))

    if (dense / "tokenizer.json").is_file():  # beside it, where only tokens leave
        return {"idle": lambda: None, "tokens": lambda: trim_checkpoint(dense, [GENERAL], 16_384, new("trimmed"))}
    return {
        "idle": lambda: None,
        "graph": lambda: build_graph(dense, settings=None, work=Work(new("graph"))),
        "importance": lambda: score_importance(
            dense,
            root / "graph",
            root / "tokens",
            settings=ImportanceSettings("taylor_first"),
            work=Work(new("importance"), CPU),
        ),
        "usual": lambda: usual(dense, root),
        "prune": pruned("none"),
        "prune, static": pruned("static"),
    }  # fmt: skip


def measure(dense: Path, root: Path, ratio: float, name: str) -> tuple[float, int]:
    """Seconds and peak memory of one stage, in this process."""
    reset_peak_memory()
    start = time.perf_counter()
    stages(dense, root, ratio)[name]()
    return time.perf_counter() - start, peak_memory()


def main(
    folder: Path,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "1b",
    ratio: float = 0.2,
    skip: Annotated[list[str] | None, typer.Option(help="A stage to leave out; repeatable.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Checkpoint whose tokenizer a shape takes.")] = None,
) -> None:
    """Measure every stage; see the top of this file."""
    dense, root = folder / shape, folder / f"{shape}-stages"
    if not (dense / "config.json").is_file():
        write_checkpoint(dense, SHAPES[shape])
    if tokenizer:
        copy_tokenizer(tokenizer, dense)
    write_tokens(root / "tokens", SHAPES[shape]["vocab_size"])
    weights = sum(file.stat().st_size for file in weight_files(dense))
    rows = []
    for name in (name for name in stages(dense, root, ratio) if name not in (skip or [])):
        with ProcessPoolExecutor(1, forking()) as worker:
            seconds, peak = worker.submit(measure, dense, root, ratio, name).result()
        rows.append({"shape": shape, "stage": name, "seconds": seconds, "peak_bytes": peak})
        idle = rows[0]["peak_bytes"]
        rows[-1] |= {"above_idle_over_weights": (peak - idle) / weights, "weight_bytes": weights}
        print(f"{name:14} {seconds:8.1f} s {peak / 2**30:7.2f} GiB, {(peak - idle) / weights:.3f} × weights + idle")
    if "usual" not in (skip or []) and not tokenizer:
        ours, theirs = read_importance(root / "importance"), np.load(root / "usual.npy")
        print(f"scores: rank correlation {pd.Series(ours).corr(pd.Series(theirs), method='spearman'):.5f}")
    pd.DataFrame(rows).to_parquet(folder / "pruning.parquet")


if __name__ == "__main__":
    typer.run(main)
