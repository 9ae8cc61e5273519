"""A model spread over two devices computes what it does on one, in every stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from helpers import CPU, load_and_render, prune, render_split, tune, write_own_benchmark
from tailored_llama.config import (
    BenchmarkConfig,
    ExecutionConfig,
    PruningConfig,
    ReconstructionConfig,
    TuningConfig,
    Work,
)
from tailored_llama.data.calibration import CALIBRATION_SCHEMA
from tailored_llama.evaluation import ScoreSettings, WrittenAnswer, generate, score_benchmark
from tailored_llama.models import devices, load, load_model, load_tokenizer, streaming
from tailored_llama.models.load import shares
from tailored_llama.pruning import ImportanceSettings, build_graph, score_importance
from tailored_llama.pruning.importance import read_importance
from tailored_llama.store import write_table
from two_devices import DEVICES, TwoDevices

BALANCED = ExecutionConfig(device="balanced", streaming="never", batch_tokens=64)
RESIDENT = ExecutionConfig(device="cpu", streaming="never", batch_tokens=64)
Stage = Callable[[ExecutionConfig, Path], Any]
IDS = torch.randint(0, 256, (5, 32), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _balanced_is_both(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (devices, load, streaming):
        monkeypatch.setattr(module, "devices_of", lambda device: DEVICES if device == "balanced" else ["cpu"])
    monkeypatch.setattr(devices, "free_memory", lambda device: 2**40)
    of_any_device = torch.autocast  # refuses devices it does not know, even where it is to do nothing

    def autocast(device_type: str, *args: Any, **options: Any) -> Any:
        return of_any_device("cpu" if device_type == "lazy" else device_type, *args, **options)

    monkeypatch.setattr(torch, "autocast", autocast)
    adamw = torch.optim.AdamW  # is fused on real devices alone
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **options: adamw(*args, **options))
    monkeypatch.setattr(torch, "lazy", torch.cpu, raising=False)  # checkpoint() asks for its random state


@pytest.fixture
def both(folder: Callable[[str], Path]) -> Callable[[Stage], tuple[Path, Path]]:
    """Run a stage on the CPU and on both devices; returns the folders it wrote to."""

    def run(stage: Stage) -> tuple[Path, Path]:
        one, two = folder("one"), folder("two")
        stage(RESIDENT, one)
        with TwoDevices():
            stage(BALANCED, two)
        return one, two

    return run


@pytest.fixture
def text(folder: Callable[[str], Path]) -> Path:
    """Calibration sequences."""
    out = folder("text")
    columns = {"input_ids": IDS.tolist(), "source": ["here"] * len(IDS), "row": range(len(IDS))}
    write_table(out / "calibration.parquet", columns, CALIBRATION_SCHEMA)
    return out


@pytest.fixture
def groups(tiny: Path, folder: Callable[[str], Path]) -> Path:
    """The groups of the tiny checkpoint, with random importances."""
    out = folder("groups")
    build_graph(tiny, settings=None, work=Work(out))
    score_importance(tiny, out, None, settings=ImportanceSettings("random", 1), work=Work(out, CPU))
    return out


@pytest.fixture
def benchmark(folder: Callable[[str], Path]) -> tuple[ScoreSettings, Path, Path]:
    """How a benchmark is scored, its prompts to train on, and others that begin with two solved examples."""
    config = BenchmarkConfig(**write_own_benchmark(folder("data")))
    evaluation = folder("evaluation")
    train = load_and_render(config, folder("train"), split="train", shots=4, held_out=2)
    render_split(train.parent / "examples", evaluation, config, num_fewshot=2)
    return ScoreSettings.of(config), train, evaluation


def column(folder: Path, file: str, name: str) -> Any:
    return pq.read_table(folder / file)[name].to_pylist()


def test_operations_on_two_devices_fail() -> None:  # else none of the others could
    with TwoDevices():
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
    with TwoDevices():
        model = load_model(checkpoint, device="balanced")
    layers = [{str(p.device) for p in layer.parameters()} for layer in model.model.layers]
    assert all(len(places) == 1 for places in layers)
    assert {"lazy:1"} in layers
    outside = {str(p.device) for name, p in model.named_parameters() if ".layers." not in name}
    assert outside == {"lazy:0"}


@pytest.mark.parametrize("checkpoint", ["untied", "gemma2"], indirect=True)
def test_scores(checkpoint: Path, benchmark: tuple[ScoreSettings, Path, Path], both: Any) -> None:
    settings, _, prompts = benchmark

    def stage(execution: ExecutionConfig, out: Path) -> None:
        score_benchmark(checkpoint, None, prompts, settings=settings, work=Work(out, execution))

    expected, found = (column(out, "predictions.parquet", "loglikelihoods") for out in both(stage))
    assert found == [pytest.approx(row, abs=1e-4) for row in expected]


def test_written_answers(tiny: Path, folder: Any) -> None:
    tokenizer, contexts = load_tokenizer(tiny), ["the sky is", "one"]
    expected = generate(load_model(tiny), tokenizer, contexts, WrittenAnswer(6, ["\n"]))
    with TwoDevices():
        assert generate(load_model(tiny, device="balanced"), tokenizer, contexts, WrittenAnswer(6, ["\n"])) == expected


@pytest.mark.parametrize("criterion", ["taylor_gate", "taylor_first"])
def test_importance(tiny: Path, groups: Path, text: Path, both: Any, criterion: Any) -> None:
    def stage(execution: ExecutionConfig, out: Path) -> None:
        settings = ImportanceSettings(criterion, 3)
        score_importance(tiny, groups, text, settings=settings, work=Work(out, execution))

    one, two = both(stage)
    np.testing.assert_allclose(read_importance(two), read_importance(one), rtol=1e-3)


def test_reconstruction(tiny: Path, groups: Path, text: Path, both: Any) -> None:
    def stage(execution: ExecutionConfig, out: Path) -> None:
        pruning, fitted = PruningConfig(min_channels=2), ReconstructionConfig(method="static")
        given: dict[str, Any] = {"ratio": 0.2, "pruning": pruning, "reconstruction": fitted}
        prune(tiny, groups, groups, text, **given, out=out, execution=execution)

    expected, found = (load_file(out / "model.safetensors") for out in both(stage))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_scores_with_an_adapter(
    tiny: Path, benchmark: tuple[ScoreSettings, Path, Path], folder: Any, both: Any
) -> None:
    (scoring, train, evaluation), adapter = benchmark, folder("adapter")
    tuning = TuningConfig(shots=4, held_out=2, epochs=1, batch_size=2, dropout=0.0, learning_rate=1e-2)
    tune(tiny, train, tuning, adapter)

    def stage(execution: ExecutionConfig, out: Path) -> None:
        score_benchmark(tiny, adapter, evaluation, settings=scoring, work=Work(out, execution))

    expected, found = (column(out, "predictions.parquet", "loglikelihoods") for out in both(stage))
    assert found == [pytest.approx(row, abs=1e-2) for row in expected]


def test_tuning_and_what_resumes_it(tiny: Path, benchmark: tuple[ScoreSettings, Path, Path], both: Any) -> None:
    tuning = TuningConfig(shots=4, held_out=2, epochs=1, batch_size=2, dropout=0.0, learning_rate=1e-2)

    def stage(execution: ExecutionConfig, out: Path) -> None:
        execution = execution.model_copy(update={"recompute_activations": True, "keep_state_every": 1})
        for _ in range(2):  # the second one resumes the finished first
            tune(tiny, benchmark[1], tuning, out, execution=execution, resume=out / "state")

    one, two = both(stage)
    for name in ("loss", "held_out_loss"):
        assert column(two, "log.parquet", name) == [
            loss if loss is None else pytest.approx(loss, abs=1e-3) for loss in column(one, "log.parquet", name)
        ]
    expected, found = (load_file(out / "adapter_model.safetensors") for out in (one, two))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)
