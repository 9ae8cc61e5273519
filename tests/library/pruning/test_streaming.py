"""Importance and reconstruction of streamed models: equal to the bit, whatever fits into memory."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from helpers import prune
from tailored_llama.config import DATA_FREE, Criterion, ExecutionConfig, PruningConfig, ReconstructionConfig, Work
from tailored_llama.data.calibration import CALIBRATION_SCHEMA
from tailored_llama.errors import InputError
from tailored_llama.models import devices, read_structure, solver_bytes, streaming
from tailored_llama.pruning import ImportanceSettings, build_graph, read_groups, score_importance
from tailored_llama.pruning.importance import read_importance, write_importance
from tailored_llama.store import write_table

IDS = torch.randint(0, 256, (5, 32), generator=torch.Generator().manual_seed(5))
RESIDENT, STREAMED = (
    ExecutionConfig(device="cpu", batch_tokens=64, streaming=streaming)  # of 160: several passes
    for streaming in ("never", "always")
)


def graph_and_text(checkpoint: Path, root: Path) -> tuple[Path, Path]:
    """The groups of a checkpoint, and calibration sequences."""
    groups, text = root / "groups", root / "text"
    groups.mkdir(parents=True)
    text.mkdir()
    build_graph(checkpoint, settings=None, work=Work(groups))
    columns = {"input_ids": IDS.tolist(), "source": ["here"] * len(IDS), "row": range(len(IDS))}
    write_table(text / "calibration.parquet", columns, CALIBRATION_SCHEMA)
    return groups, text


def scores(checkpoint: Path, root: Path, criterion: Any, execution: ExecutionConfig) -> np.ndarray[Any, Any]:
    groups, text = graph_and_text(checkpoint, root)
    out = root / "importance"
    out.mkdir()
    score_importance(checkpoint, groups, text, settings=ImportanceSettings(criterion, 3), work=Work(out, execution))
    assert [file.name for file in out.iterdir()] == ["importance.parquet"]
    return read_importance(out)


def pruned(checkpoint: Path, root: Path, method: Any, execution: ExecutionConfig) -> dict[str, bytes]:
    """The files of a checkpoint pruned by random importances."""
    root = root / f"{method}-{execution.streaming}"
    groups, text = graph_and_text(checkpoint, root)
    found = read_groups(groups)
    write_importance(groups, found, np.random.default_rng(1).random(len(found)), "random")
    out = root / "out"
    out.mkdir()
    prune(
        checkpoint,
        groups,
        groups,
        text,
        ratio=0.2,
        pruning=PruningConfig(min_channels=2),
        reconstruction=ReconstructionConfig(method=method),
        out=out,
        execution=execution,
    )
    return {file.name: file.read_bytes() for file in out.iterdir()}


CRITERIA = sorted(set(get_args(Criterion)) - set(DATA_FREE))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_importance_is_equal_to_the_bit(checkpoint: Path, tmp_path: Path, criterion: Any) -> None:
    resident = scores(checkpoint, tmp_path / "resident", criterion, RESIDENT)
    assert len(np.unique(resident)) > 8
    assert np.array_equal(resident, scores(checkpoint, tmp_path / "streamed", criterion, STREAMED))


def test_reconstruction_is_equal_to_the_byte(checkpoint: Path, tmp_path: Path) -> None:
    assert pruned(checkpoint, tmp_path, "static", RESIDENT) == pruned(checkpoint, tmp_path, "static", STREAMED)


@pytest.mark.parametrize("work", ["importance", "reconstruction"])
def test_hidden_states_past_the_bound_go_to_disk(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    def result(execution: ExecutionConfig) -> Any:
        if work == "reconstruction":
            return pruned(tiny, tmp_path, "static", execution)
        return scores(tiny, tmp_path / execution.streaming, "taylor_gate", execution).tolist()

    resident = result(RESIDENT)
    files: list[Path] = []
    save = streaming.save_file
    monkeypatch.setattr(streaming, "save_file", lambda tensors, path: (files.append(path), save(tensors, path)))
    monkeypatch.setattr(streaming, "STATES_IN_MEMORY", 10_000)  # a boundary of this text takes 20,480 bytes
    assert resident == result(STREAMED)
    assert len(files) > 5
    assert not any(file.exists() for file in files)


def test_only_one_layer_is_loaded_at_a_time(tiny: Path, tmp_path: Path) -> None:
    layers = streaming.layers_of(streaming.open_model(tiny, STREAMED, tmp_path))
    for number, _ in layers.each(-1):
        loaded = [not any(p.is_meta for p in module.parameters()) for module in layers.modules]
        assert loaded == [index == number for index in range(4)]
    assert all(p.is_meta for module in layers.modules for p in module.parameters())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_importance_reads_the_weights_at_most_twice(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, criterion: str
) -> None:
    read: list[str] = []
    tensors = streaming._Files.tensors
    monkeypatch.setattr(
        streaming._Files,
        "tensors",
        lambda files, names, prefix="": (read.append(prefix), tensors(files, names, prefix))[1],
    )
    scores(tiny, tmp_path, criterion, STREAMED)
    assert sorted(filter(None, read)) == sorted([f"model.layers.{number}." for number in range(4)] * 2)


def test_fits_that_have_no_room_are_refused_before_they_begin(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "free_memory", lambda device: 1000)
    with pytest.raises(InputError, match=r"^reconstruction.method: got 'static', whose fits need about 0 GB, 0 "):
        pruned(tiny, tmp_path, "static", RESIDENT)
    pruned(tiny, tmp_path, "none", RESIDENT)


def test_the_room_that_fits_need_grows_with_the_square_of_the_widest_projection(tiny: Path) -> None:
    structure = read_structure(tiny)
    assert solver_bytes(structure) >= 12 * 32**2
