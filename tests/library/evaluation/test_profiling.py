"""Profiling: the decode loop against generate, rows, table, messages."""

import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from helpers import prune
from tailored_llama import models
from tailored_llama.cli import main
from tailored_llama.config import ProfileConfig, PruningConfig, Work, validate_config
from tailored_llama.errors import InputError
from tailored_llama.evaluation import ProfileRow, ProfileSettings, profile_checkpoint, profiling, read_profile
from tailored_llama.evaluation.profiling import decode
from tailored_llama.models import load_model, read_structure
from tailored_llama.pruning import build_graph, read_groups
from tailored_llama.pruning.importance import write_importance
from tailored_llama.reports import profile_table

LOAD = ProfileConfig(prompt_tokens=5, new_tokens=3)


@pytest.fixture(scope="module")
def pruned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    groups, out = tmp_path_factory.mktemp("groups"), tmp_path_factory.mktemp("pruned")
    build_graph(tiny, settings=None, work=Work(groups))
    found = read_groups(groups)
    write_importance(groups, found, np.random.default_rng(1).random(len(found)), "random")
    prune(tiny, groups, groups, None, ratio=0.2, pruning=PruningConfig(min_channels=2), out=out)
    return out


@pytest.fixture(scope="module")
def profiled(tiny: Path, pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the command wrote and what it printed: processes are slow to start, so it runs once."""
    out = tmp_path_factory.mktemp("profiled") / "out"
    batches = ["--batch", "2", "--batch", "1", "--batch", "2"]
    options = [*batches, "--prompt-tokens", "5", "--new-tokens", "3", "--device", "cpu"]
    arguments = [str(pruned), "--against", str(tiny), *options, "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as shown:
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", ["tailored-llama", "profile", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    return out, shown.getvalue()


@pytest.fixture
def rows(profiled: tuple[Path, str]) -> list[ProfileRow]:
    return read_profile(profiled[0])


@pytest.mark.parametrize("batch", [1, 3])
def test_the_loop_writes_what_generate_writes(tiny: Path, pruned: Path, batch: int) -> None:
    ids = torch.randint(0, 256, (batch, 9), generator=torch.Generator().manual_seed(batch))
    for folder in (tiny, pruned):
        model = load_model(folder)
        model.generation_config.eos_token_id = None  # the loop goes on past it
        seen = torch.ones_like(ids)  # else generate takes a token that happens to be the padding for padding
        expected = model.generate(ids, attention_mask=seen, max_new_tokens=12, do_sample=False, pad_token_id=0)[:, 9:]
        tokens, prefill, rest = decode(model, ids, 12)
        assert tokens.tolist() == expected.tolist()
        assert len(set(tokens.flatten().tolist())) > 1
        assert prefill > 0
        assert rest > 0


def test_a_row_for_each_checkpoint_and_batch(rows: list[ProfileRow], tiny: Path, pruned: Path) -> None:
    assert [(row.role, row.checkpoint, row.batch) for row in rows] == [
        ("checkpoint", str(pruned), 1),
        ("checkpoint", str(pruned), 2),
        ("against", str(tiny), 1),
        ("against", str(tiny), 2),
    ]
    one, other = read_structure(pruned), read_structure(tiny)
    for row in rows:
        assert (row.prompt_tokens, row.new_tokens, row.repeats, row.device, row.dtype) == (5, 3, 5, "cpu", "float32")
        assert row.parameters == (one if row.role == "checkpoint" else other).parameters
        assert row.prefill_tokens_per_second > 0
        assert row.decode_tokens_per_second > 0
        assert row.peak_memory_bytes >= row.base_memory_bytes > 0
        if row.role == "checkpoint":
            for phase in ("prefill", "decode"):
                low, middle, high = (getattr(row, f"{phase}_speedup{end}") for end in ("_low", "", "_high"))
                assert 0 < low <= middle <= high
        else:
            assert row.prefill_speedup is row.decode_speedup is None
            assert row.weight_bytes == (tiny / "model.safetensors").stat().st_size


def test_the_command_writes_one_table_and_prints_it(profiled: tuple[Path, str], rows: list[ProfileRow]) -> None:
    out, shown = profiled
    assert [path.name for path in out.iterdir()] == ["profile.parquet"]
    mine, _, other, _ = rows
    text = " ".join(shown.split())  # also at the spaces that do not break
    for row in (mine, other):
        size = f"{row.parameters:,} parameters, {row.weight_bytes / 1e6:.1f} MB"
        assert f"{Path(row.checkpoint).name}: {size}" in text
    assert f"{mine.prefill_speedup:.2f}" in text
    assert "in float32: 5 tokens a prompt, 3 new ones. Median of 5 passes; × other: the speed ÷ its, the median" in text


def printed(rows: list[ProfileRow]) -> str:
    """The table on a terminal of 80 characters."""
    console = Console(width=80, file=StringIO())
    console.print(profile_table(rows))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_fits_a_terminal(rows: list[ProfileRow]) -> None:
    large: dict[str, Any] = {"parameters": 70_553_706_496}
    for phase in ("prefill", "decode"):
        large |= {f"{phase}_speedup": 1.5, f"{phase}_speedup_low": 1.25, f"{phase}_speedup_high": 11.75}
    shown = printed([replace(row, checkpoint=f"checkpoints/{row.role}", **large) for row in rows])
    assert shown.count("70,553,706,496 parameters") == 2
    assert shown.count("1.25–11.75") == 8
    assert "…" not in shown


def test_one_checkpoint_alone_has_no_ratios(rows: list[ProfileRow]) -> None:
    shown = printed([replace(row, role="checkpoint") for row in rows if row.role == "against"])
    assert f"{rows[-1].parameters:,} parameters" in shown
    assert "the speed ÷ its" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": (4, 0)}, "profile.batches.1: got 0; allowed: greater than or equal to 1"),
        ({"prompt_tokens": 0}, "profile.prompt_tokens: got 0; allowed: greater than or equal to 1"),
        ({"new_tokens": 1}, "profile.new_tokens: got 1; allowed: greater than or equal to 2"),
        ({"repeats": 0}, "profile.repeats: got 0; allowed: greater than or equal to 1"),
        (
            {"prompt_tokens": 250, "new_tokens": 7},
            "prompt_tokens + new_tokens: got 257; allowed: at most 256, the conte",
        ),
        ({"device": "tpu"}, "execution.device: got 'tpu'; allowed: text that matches"),
        ({"against": Path("nowhere")}, "nowhere/config.json: missing or not JSON; allowed: a checkpoint folder"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(profiling, "_process", lambda: pytest.fail("a process was started"))
    profile = {name: value for name, value in options.items() if name not in ("device", "against")}

    def measure() -> None:
        run = validate_config({"profile": profile, "execution": {"device": options.get("device", "cpu")}})
        settings = ProfileSettings.of(run.profile, run.execution.device)
        profile_checkpoint(tiny, options.get("against"), settings=settings, work=Work(tmp_path))

    with pytest.raises(InputError, match=re.escape(message)):
        measure()


def test_running_out_of_memory_is_said(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(profiling, "decode", exhausted)
    with pytest.raises(InputError, match=r"batch: got 64; allowed: fewer prompts \(.* ran out of memory\)"):
        profiling._measure(tiny, "cpu", 64, LOAD)
    monkeypatch.setattr(models, "load_model", exhausted)
    with pytest.raises(InputError, match="checkpoint: got large; allowed: one that fits into memory"):
        profiling._measure(Path("large"), "cpu", 64, LOAD)
    with (
        ProcessPoolExecutor(1, get_context("spawn"), os._exit, (9,)) as killed,
        pytest.raises(InputError, match=r"batch: got 64; allowed: fewer prompts \(the process of here died"),
    ):
        profiling._ask(killed, Path("here"), "cpu", 64, LOAD)
