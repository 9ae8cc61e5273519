"""Scores with the weights of a GGUF file: those of the checkpoint where no bit is lost, else close; and its bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import helpers
from tailored_llama.config import BenchmarkConfig
from tailored_llama.data.benchmarks import load_benchmark
from tailored_llama.data.prompts import render_prompts
from tailored_llama.evaluation.scoring import score_benchmark
from tailored_llama.serving import write_gguf
from tailored_llama.serving.quantised import score_quantised


def test_scores_are_those_of_the_file_s_weights(tmp_path: Path, folder: Callable[[str], Path]) -> None:
    checkpoint = helpers.add_merge(helpers.save_tiny_llama(folder("dense"), hidden_size=64, noise=0.1))
    benchmark = BenchmarkConfig(**helpers.write_own_benchmark(folder("data")))
    folders = {name: folder(name) for name in ("examples", "prompts", "plain", "f32", "q8_0", "q4_0")}
    load_benchmark(benchmark, downloads="", out=folders["examples"])
    render_prompts(
        folders["examples"], benchmark=benchmark, split="evaluation", template="harness", out=folders["prompts"]
    )
    given: dict[str, Any] = {"benchmark": benchmark, "execution": helpers.CPU}
    score_benchmark(checkpoint, None, folders["prompts"], out=folders["plain"], **given)
    types: list[Any] = ["f32", "q8_0", "q4_0"]
    for kind in types:
        score_quantised(checkpoint, None, folders["prompts"], gguf_type=kind, out=folders[kind], **given)
    scores = {
        name: pq.read_table(folders[name] / "predictions.parquet")["loglikelihoods"].to_pylist()
        for name in ("plain", *types)
    }
    assert scores["f32"] == scores["plain"]
    errors = {
        kind: max(
            abs(a - b)
            for own, row in zip(scores[kind], scores["plain"], strict=True)
            for a, b in zip(own, row, strict=True)
        )
        for kind in types
    }
    assert 0 < errors["q8_0"] < errors["q4_0"] / 4
    for kind in types:
        metrics = json.loads((folders[kind] / "metrics.json").read_text())
        size = write_gguf(checkpoint, gguf_type=kind, out=tmp_path / "model.gguf").size
        assert (metrics["type"], metrics["bytes"]) == (kind, pytest.approx(size, abs=100))  # another name
        assert {path.name for path in folders[kind].iterdir()} == {"metrics.json", "predictions.parquet"}
