"""Scoring and perplexity of streamed models: the same files; what cannot be streamed says so."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from helpers import load_and_render, write_own_benchmark
from tailored_llama.config import (
    BenchmarkConfig,
    ExecutionConfig,
    PerplexityConfig,
    TuningConfig,
    Work,
    validate_config,
)
from tailored_llama.errors import InputError
from tailored_llama.evaluation import PerplexitySettings, ScoreSettings, measure_perplexity, score_benchmark
from tailored_llama.models import add_adapter, devices, load_model, passes, save_adapter, streaming, using_threads
from tailored_llama.preflight import preflight_tailor

RESIDENT, STREAMED, AUTO = (
    ExecutionConfig(device="cpu", batch_tokens=64, streaming=streaming) for streaming in ("never", "always", "auto")
)
TEXT = "The quick brown fox jumps over the lazy dog.\n\nTwice  it does. " * 4
Folder = Callable[[str], Path]


@pytest.fixture
def benchmark_and_prompts(folder: Folder) -> tuple[BenchmarkConfig, Path]:
    """A benchmark and its prompts, which begin with two solved examples."""
    benchmark = BenchmarkConfig(**write_own_benchmark(folder("data")))
    return benchmark, load_and_render(benchmark, folder("rendered"), num_fewshot=2)


def score(
    checkpoint: Path,
    given: tuple[BenchmarkConfig, Path],
    out: Path,
    execution: ExecutionConfig,
    adapter: Path | None = None,
) -> Any:
    benchmark, prompts = given
    score_benchmark(checkpoint, adapter, prompts, settings=ScoreSettings.of(benchmark), work=Work(out, execution))
    return files(out)


def files(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.mark.parametrize("tokens", [2**18, 300], ids=["one sweep", "several sweeps"])
def test_scores_are_equal_to_the_bit(
    checkpoint: Path,
    benchmark_and_prompts: tuple[BenchmarkConfig, Path],
    folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
) -> None:
    """Also with threads, where a model that is loaded whole takes several rows at once."""
    monkeypatch.setattr(passes, "_SWEEP_TOKENS", tokens)
    with using_threads(2):
        resident, streamed = (
            score(checkpoint, benchmark_and_prompts, folder(e.streaming), e) for e in (RESIDENT, STREAMED)
        )
    assert resident == streamed
    assert resident.keys() == {"predictions.parquet", "metrics.json"}


def test_perplexity_is_equal_to_the_bit(checkpoint: Path, folder: Folder) -> None:
    source = folder("data") / "text.txt"
    source.write_text(TEXT)
    settings = PerplexitySettings.of(PerplexityConfig(source=str(source), window=32))
    resident, streamed = folder("resident"), folder("streamed")
    measure_perplexity(checkpoint, None, settings=settings, work=Work(resident, RESIDENT))
    measure_perplexity(checkpoint, None, settings=settings, work=Work(streamed, STREAMED))
    assert files(resident) == files(streamed)


def test_memory_that_runs_out_halves_the_rows_of_a_sweep(
    tiny: Path,
    benchmark_and_prompts: tuple[BenchmarkConfig, Path],
    folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wide = ExecutionConfig(device="cpu", batch_tokens=512, streaming="always")
    forward = LlamaDecoderLayer.forward

    def small(layer: Any, states: torch.Tensor, **arguments: Any) -> Any:
        if states.shape[1] > 150:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(layer, states, **arguments)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", small)
    score(tiny, benchmark_and_prompts, folder("streamed"), wide)
    assert "memory ran out: going on with" in caplog.text
    assert len(list((folder("x").parent / "streamed").iterdir())) == 2


def test_what_needs_the_whole_model_is_refused_or_loaded_whole(
    tiny: Path,
    benchmark_and_prompts: tuple[BenchmarkConfig, Path],
    folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    adapter = folder("adapter")
    save_adapter(add_adapter(load_model(tiny), TuningConfig(rank=4)), tiny, adapter)
    message = r"^execution\.streaming: got 'always' with an adapter; allowed: auto or never"
    with pytest.raises(InputError, match=message):
        score(tiny, benchmark_and_prompts, folder("refused"), STREAMED, adapter=adapter)
    monkeypatch.setattr(streaming, "free_memory", lambda device: 1000)
    with caplog.at_level(logging.WARNING):
        whole = score(tiny, benchmark_and_prompts, folder("whole"), AUTO, adapter=adapter)
    assert "takes up to 0.0 GB of memory, 0.0 are free, but an adapter cannot be streamed" in caplog.text
    assert whole == score(tiny, benchmark_and_prompts, folder("never"), RESIDENT, adapter=adapter)


def test_auto_streams_what_does_not_fit(tiny: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (tiny / "model.safetensors").stat().st_size
    for free, streamed in ((size - 1, True), (size, False)):
        monkeypatch.setattr(streaming, "free_memory", lambda device, free=free: free)
        model = streaming.open_model(tiny, AUTO, folder(f"scratch-{free}"))
        assert streaming.layers_of(model).streamed is streamed


def test_a_run_that_cannot_be_fitted_is_refused_before_it_begins(
    own_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    preflight_tailor(validate_config(own_run))
    monkeypatch.setattr(devices, "free_memory", lambda device: 1000)
    with pytest.raises(InputError, match=r"^reconstruction\.method: got 'static', whose fits need about"):
        preflight_tailor(validate_config(own_run))
