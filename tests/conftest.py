"""A tiny random Llama with grouped-query attention, a byte tokenizer, and a small benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tailored_llama.console import quiet_libraries


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    quiet_libraries()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; 256 is the end (and beginning) of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")


def save_tiny_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a seeded 4-layer Llama (4 query heads over 2 KV heads, 24 channels) with its tokenizer."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "initializer_range": 0.2,  # large enough that no two logits are alike by accident
    }
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes)))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense tiny checkpoint."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "dense")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """Make a new folder below the test's own."""

    def make(name: str) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        return path

    return make


COLOURS = ("red", "blue", "green", "black")
THINGS = ("sky", "coal", "blood", "grass", "ink", "rust", "leaf", "sea")


def write_own_benchmark(folder: Path, train: int = 24, evaluation: int = 12) -> dict[str, Any]:
    """Write a two-file benchmark of the user's own and return its table of the configuration."""
    for name, count in (("train", train), ("evaluation", evaluation)):
        rows = [
            {
                "question": f"{name} {i}: the {THINGS[i % len(THINGS)]} is",
                "options": list(COLOURS),
                "right": i % len(COLOURS),
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "colours",
        "train": str(folder / "train.jsonl"),
        "evaluation": str(folder / "evaluation.jsonl"),
        "context": "question",
        "choices": "options",
        "answer": "right",
        "instruction": "Name the colour.",
    }


@pytest.fixture
def own_run(tmp_path: Path, tiny: Path) -> dict[str, Any]:
    """A whole run configuration on the tiny model and the user's own benchmark, as plain data."""
    (tmp_path / "data").mkdir()
    text = tmp_path / "data" / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return {
        "benchmarks": [write_own_benchmark(tmp_path / "data")],
        "model": {"source": str(tiny)},
        "calibration": {"source": str(text), "samples": 3, "tokens": 16},
        "pruning": {"ratios": [0.2], "min_channels": 4},
        "tuning": {"shots": 8, "held_out": 4, "epochs": 2, "learning_rate": 1e-2},
        "perplexity": {"source": str(text), "window": 32, "tokens": 128},
        "store": {"root": str(tmp_path / "store"), "downloads": str(tmp_path / "downloads")},
    }
