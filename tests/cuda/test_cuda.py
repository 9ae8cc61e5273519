"""A CUDA device computes what the CPU does, in the memory it has, one stage on each GPU."""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from helpers import CPU, load_and_render, render_split, save_tiny_llama, tune, write_own_benchmark
from tailored_llama.config import BenchmarkConfig, ExecutionConfig, TuningConfig, Work
from tailored_llama.data import loglikelihoods
from tailored_llama.evaluation import ScoreSettings, score_benchmark
from tailored_llama.models import Document, Encoded, device_slot, load_model, weight_bytes

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is false"),
]

CUDA = ExecutionConfig(device="cuda")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Mistral (sliding window)": ("mistral", {"sliding_window": 24}),
    "Gemma 2 (soft-capping, windows)": (
        "gemma2",
        {"query_pre_attn_scalar": 8, "sliding_window": 24, "attn_logit_softcapping": 2.0},
    ),
    "Qwen3": ("qwen3", {}),
}
Folder = Callable[[str], Path]


@pytest.fixture
def benchmark(folder: Folder) -> tuple[BenchmarkConfig, Path]:
    """A benchmark and its prompts to train on."""
    config = BenchmarkConfig(**write_own_benchmark(folder("data")))
    return config, load_and_render(config, folder("train"), split="train", shots=4, held_out=4)


@pytest.fixture
def score(benchmark: tuple[BenchmarkConfig, Path], folder: Folder) -> Callable[..., list[list[float]]]:
    """Scores a checkpoint on prompts that begin with two solved examples, which are encoded once."""
    (config, train), prompts = benchmark, folder("evaluation")
    render_split(train.parent / "examples", prompts, config, num_fewshot=2)

    def scored(checkpoint: Path, execution: ExecutionConfig) -> list[list[float]]:
        out = folder(f"{checkpoint.name} {execution.device} {execution.streaming}")
        score_benchmark(checkpoint, None, prompts, settings=ScoreSettings.of(config), work=Work(out, execution))
        return list(pq.read_table(out / "predictions.parquet")["loglikelihoods"].to_pylist())

    return scored


@pytest.fixture
def memory_limit() -> Iterator[Callable[[int], None]]:
    """Limits what torch may take of the GPU, beyond what it holds."""

    def limit(more: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize(("architecture", "changes"), MODELS.values(), ids=MODELS.keys())
def test_scores_equal_those_of_the_cpu(
    architecture: str, changes: dict[str, Any], score: Callable[..., list[list[float]]], folder: Folder
) -> None:
    checkpoint = save_tiny_llama(folder("dense"), architecture=architecture, noise=0.1, **changes)
    expected, found = score(checkpoint, CPU), score(checkpoint, CUDA)
    assert found == [pytest.approx(row, abs=1e-4) for row in expected]


def test_memory_that_runs_out_halves_the_passes(
    folder: Folder, memory_limit: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(save_tiny_llama(folder("dense"), intermediate_size=2048), device="cuda")
    prompts = [Encoded(Document([i + 1] * 250), ((249,),), ((7,),)) for i in range(64)]
    expected = loglikelihoods(model, prompts, 1000)
    memory_limit(200_000_000)  # a pass of 16,000 tokens asks for three times 131 MB
    found = loglikelihoods(model, prompts, 16_000)
    assert found == [pytest.approx(row, abs=1e-4) for row in expected]
    assert "memory ran out: going on with 8000 tokens a pass" in caplog.text


def test_every_gpu_has_a_slot_of_its_own(tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    with ExitStack() as stack:
        held = []
        for _ in range(count):
            stack.enter_context(device_slot(CUDA, str(tmp_path)))
            held.append(torch.cuda.current_device())
    assert held == list(range(count))


def test_a_streamed_model_scores_alike_in_less_memory(score: Callable[..., list[list[float]]], folder: Folder) -> None:
    checkpoint = save_tiny_llama(folder("dense"), intermediate_size=16_384, num_hidden_layers=16)  # 101 MB
    resident, streamed = (
        ExecutionConfig(device="cuda", batch_tokens=64, streaming=streaming) for streaming in ("never", "always")
    )
    expected = score(checkpoint, resident)
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = score(checkpoint, streamed)
    assert found == [pytest.approx(row, abs=1e-4) for row in expected]
    assert torch.cuda.max_memory_allocated() - before < weight_bytes(checkpoint) / 2


def test_a_step_of_tuning_has_the_loss_of_the_cpu(
    tiny: Path, benchmark: tuple[BenchmarkConfig, Path], folder: Folder
) -> None:
    settings = TuningConfig(shots=4, held_out=4, epochs=1, batch_size=4, learning_rate=1e-2)
    logs = []
    for execution in (CPU, CUDA):
        out = folder(execution.device)
        tune(tiny, benchmark[1], settings, out, execution=execution)
        logs.append(pq.read_table(out / "log.parquet").to_pydict())
        assert all(tensor.isfinite().all() for tensor in load_file(out / "adapter_model.safetensors").values())
    expected, found = logs
    assert found["step"] == expected["step"] == [0, 1]
    assert found["loss"][1] == pytest.approx(expected["loss"][1], abs=1e-4)
    assert found["held_out_loss"][0] == pytest.approx(expected["held_out_loss"][0], abs=1e-4)
