"""Scores with the weights of a GGUF file: those of the checkpoint where no bit is lost, else close; and its bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import helpers
from tailored_llama.config import BenchmarkConfig, Work
from tailored_llama.evaluation import ScoreSettings, score_benchmark
from tailored_llama.serving import GgufSettings, QuantisedSettings, export_gguf, score_quantised, write_gguf


def test_scores_are_those_of_the_file_s_weights(tmp_path: Path, folder: Callable[[str], Path]) -> None:
    checkpoint = helpers.add_merge(helpers.save_tiny_llama(folder("dense"), hidden_size=64, noise=0.1))
    benchmark = BenchmarkConfig(**helpers.write_own_benchmark(folder("data")))
    prompts = helpers.load_and_render(benchmark, folder("rendered"))
    folders = {name: folder(name) for name in ("plain", "f32", "q8_0", "q4_0")}
    plain = Work(folders["plain"], helpers.CPU)
    score_benchmark(checkpoint, None, prompts, settings=ScoreSettings.of(benchmark), work=plain)
    types: list[Any] = ["f32", "q8_0", "q4_0"]
    for kind in types:
        export_gguf(checkpoint, settings=GgufSettings(kind, "model"), work=Work(written := folder(f"file-{kind}")))
        settings, work = QuantisedSettings.of(benchmark, kind), Work(folders[kind], helpers.CPU)
        score_quantised(checkpoint, written, prompts, settings=settings, work=work)
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
