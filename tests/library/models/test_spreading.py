"""A model spread over two devices computes what it does on one, in every stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from helpers import CPU, write_own_benchmark
from tailored_llama.config import (
    BenchmarkConfig,
    DistillationConfig,
    ExecutionConfig,
    PerplexityConfig,
    PruningConfig,
    ReconstructionConfig,
    TuningConfig,
)
from tailored_llama.data.benchmarks import load_benchmark
from tailored_llama.data.calibration import CALIBRATION_SCHEMA
from tailored_llama.data.prompts import render_prompts
from tailored_llama.evaluation.generation import generate
from tailored_llama.evaluation.perplexity import measure_perplexity
from tailored_llama.evaluation.profiling import decode
from tailored_llama.evaluation.scoring import score_benchmark
from tailored_llama.models import devices, load, load_model, load_tokenizer, streaming
from tailored_llama.models.spreading import shares
from tailored_llama.pruning.allocation import search_widths
from tailored_llama.pruning.groups import build_graph
from tailored_llama.pruning.importance import read_importance, score_importance
from tailored_llama.pruning.prune import prune
from tailored_llama.store import write_table
from tailored_llama.training import loop
from tailored_llama.training.distillation import teach
from tailored_llama.training.tuning import Source, tune
from two_devices import DEVICES, TwoDevices

BOTH = (CPU, ExecutionConfig(device="balanced", streaming="never", batch_tokens=64))
Folder = Callable[[str], Path]
IDS = torch.randint(0, 256, (5, 32), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`balanced` means both devices."""
    for module in (devices, load, streaming):
        monkeypatch.setattr(module, "devices_of", lambda device: DEVICES if device == "balanced" else ["cpu"])
    monkeypatch.setattr(devices, "free_memory", lambda device: 2**40)
    with TwoDevices():
        yield


@pytest.fixture
def text(folder: Folder) -> Path:
    """Calibration sequences."""
    out = folder("text")
    columns = {"input_ids": IDS.tolist(), "source": ["here"] * len(IDS), "row": range(len(IDS))}
    write_table(out / "calibration.parquet", columns, CALIBRATION_SCHEMA)
    return out


@pytest.fixture
def groups(checkpoint: Path, folder: Folder) -> Path:
    build_graph(checkpoint, out=(out := folder("groups")))
    return out


@pytest.fixture
def benchmark(folder: Folder) -> tuple[BenchmarkConfig, Path]:
    """A benchmark and its examples."""
    config, examples = BenchmarkConfig(**write_own_benchmark(folder("data"))), folder("examples")
    load_benchmark(config, downloads="", out=examples)
    return config, examples


def test_operations_on_two_devices_fail() -> None:
    one, other = (torch.ones(3, device=device) for device in DEVICES)
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        one + other
    assert (one + other.to(one.device)).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("layers", "rest", "count", "expected"),
    [
        ([1, 1, 1, 1], 0, 2, [0, 0, 1, 1]),
        ([1, 1, 1, 1], 2, 2, [0, 1, 1, 1]),
        ([1, 1, 1, 1], 9, 3, [1, 1, 2, 2]),
        ([1, 1], 0, 3, [0, 2]),
        ([5, 1, 1, 1], 0, 2, [0, 1, 1, 1]),
    ],
)
def test_every_device_gets_about_the_same(layers: list[int], rest: int, count: int, expected: list[int]) -> None:
    assert shares(layers, rest, count) == expected


def test_layers_are_whole_and_all_else_is_on_the_first_device(checkpoint: Path) -> None:
    model = load_model(checkpoint, device="balanced")
    places = [{str(p.device) for p in layer.parameters()} for layer in model.model.layers]
    assert {"lazy:1"} in places
    assert all(len(place) == 1 for place in places)
    outside = {str(p.device) for name, p in model.named_parameters() if ".layers." not in name}
    assert outside == {"lazy:0"}


def test_scores(checkpoint: Path, benchmark: tuple[BenchmarkConfig, Path], folder: Folder) -> None:
    config, examples = benchmark
    prompts = folder("prompts")
    render_prompts(examples, benchmark=config, split="evaluation", template="harness", num_fewshot=2, out=prompts)
    found = []
    for execution in BOTH:
        out = folder(execution.device)
        score_benchmark(checkpoint, None, prompts, benchmark=config, out=out, execution=execution)
        found.append(pq.read_table(out / "predictions.parquet")["loglikelihoods"].to_pylist())
    assert found[1] == [pytest.approx(row, abs=1e-4) for row in found[0]]


def test_generate(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    texts = [generate(load_model(checkpoint, device=execution.device), tokenizer, ["the sky is", "one"], 6, ["\n"]) for execution in BOTH]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("criterion", ["taylor_gate", "taylor_mixed", "flap"])
def test_importance(checkpoint: Path, groups: Path, text: Path, folder: Folder, criterion: Any) -> None:
    found = []
    for execution in BOTH:
        out = folder(execution.device)
        score_importance(checkpoint, groups, text, criterion=criterion, seed=3, out=out, execution=execution, influence=True)
        found.append((read_importance(out), pq.read_table(out / "influence.parquet")["influence"].to_numpy()))
    for own, expected in zip(*found, strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-3)


@pytest.mark.parametrize("method", ["static", "sequential"])
def test_reconstruction(checkpoint: Path, groups: Path, text: Path, folder: Folder, method: Any) -> None:
    score_importance(checkpoint, groups, None, criterion="random", seed=1, out=groups, execution=CPU)
    found = []
    for execution in BOTH:
        out = folder(execution.device)
        prune(
            checkpoint,
            groups,
            groups,
            text,
            ratio=0.2,
            pruning=PruningConfig(allocation="global", min_channels=2),
            reconstruction=ReconstructionConfig(method=method),
            out=out,
            execution=execution,
        )
        found.append(load_file(out / "model.safetensors"))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-3, atol=1e-4, msg=name)
