"""Profiling: counts against a hand count and torch's own, the decode loop against generate, rows, table, messages."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
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
from torch.utils.flop_counter import FlopCounterMode

from helpers import prune, remove_blocks, save_tiny_llama
from tailored_llama.cli import main
from tailored_llama.config import PruningConfig, Work, validate_config
from tailored_llama.errors import InputError
from tailored_llama.evaluation import ProfileRow, ProfileSettings, profile_checkpoint, profiling, read_profile
from tailored_llama.evaluation.costs import Costs, Load, count_costs
from tailored_llama.evaluation.profiling import decode
from tailored_llama.models import load_model, read_config, read_structure
from tailored_llama.pruning import build_graph, read_groups
from tailored_llama.pruning.importance import write_importance
from tailored_llama.reports import profile_table

LOAD = Load(prompt_tokens=5, new_tokens=3)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "sliding window": {"architecture": "mistral", "sliding_window": 4},
    "sliding in later layers": {
        "architecture": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
    },
    "fused": {"architecture": "phi3", "pad_token_id": 0, "sliding_window": None},
    "local and global layers": {"architecture": "gemma3_text", "query_pre_attn_scalar": 8, "sliding_window": 4},
}


def layered(dense: Path, out: Path) -> Path:
    """A pruned checkpoint whose layers have different widths."""
    groups = out.with_name(f"{out.name}-groups")
    groups.mkdir()
    out.mkdir()
    build_graph(dense, settings=None, work=Work(groups))
    found = read_groups(groups)
    write_importance(groups, found, np.random.default_rng(1).random(len(found)), "random")
    settings = PruningConfig(shape="any", min_channels=2)
    prune(dense, groups, groups, None, ratio=0.2, pruning=settings, out=out)
    assert read_config(out)["model_type"].startswith("tailored_")
    return out


def without_blocks(dense: Path, out: Path) -> Path:
    """A pruned checkpoint whose first layer has no attention, and whose second has no MLP."""
    return remove_blocks(dense, out, [(0, "attention"), (1, "mlp")])


@pytest.fixture(scope="module")
def pruned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layered(tiny, tmp_path_factory.mktemp("layered") / "pruned")


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


@pytest.mark.parametrize("tied", [True, False])
def test_counts_by_hand(tmp_path: Path, tied: bool) -> None:
    dense = save_tiny_llama(tmp_path / "dense", tie_word_embeddings=tied)
    # a layer: q and o 32 × 32 each, k and v 32 × 16 each, three MLP matrices of 32 × 24; two norms of 32
    layer, head = 2 * 1024 + 2 * 512 + 3 * 768, 260 * 32
    total = 4 * (layer + 64) + 32 + head * (1 if tied else 2)
    found = count_costs(dense, LOAD)
    assert layer == 5376
    assert found == Costs(
        parameters=total,
        computed_parameters=4 * 5376 + 4 * 64 + 32 + 8320,
        weight_bytes=(dense / "model.safetensors").stat().st_size,
        linear_flops=2 * (4 * 5376 + 8320),
        attention_flops=4 * (2 * 2 * 4 * 8 * 7),  # the last token sees 5 + 3 − 1
        prompt_flops=2 * (5 * 4 * 5376 + 8320) + 4 * (2 * 2 * 4 * 8 * (1 + 2 + 3 + 4 + 5)),
    )


def test_a_block_that_is_gone_costs_nothing(tiny: Path, tmp_path: Path) -> None:
    dense, found = count_costs(tiny, LOAD), count_costs(without_blocks(tiny, tmp_path / "pruned"), LOAD)
    assert dense.linear_flops - found.linear_flops == 2 * (2 * 1024 + 2 * 512 + 3 * 768)  # one attention and one MLP
    assert found.attention_flops == 3 / 4 * dense.attention_flops


def test_counts_of_layers_of_different_widths(pruned: Path) -> None:
    structure, found = read_structure(pruned), count_costs(pruned, LOAD)
    assert len(set(structure.layers)) > 1
    matrices = sum(32 * 8 * (2 * one.heads + 2 * one.kv_heads) + 3 * 32 * one.channels for one in structure.layers)
    heads = sum(one.heads for one in structure.layers)
    assert found.parameters == found.computed_parameters == structure.parameters
    assert found.parameters == matrices + 4 * 64 + 32 + 8320
    assert found.linear_flops == 2 * (matrices + 8320)
    assert found.attention_flops == 4 * heads * 8 * 7
    assert found.prompt_flops == 2 * (5 * matrices + 8320) + 4 * heads * 8 * 15


@pytest.mark.parametrize("prune_it", [None, layered, without_blocks], ids=["dense", "layered", "without blocks"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_torch_counts_the_same_for_a_decoded_token(
    tmp_path: Path, changes: dict[str, Any], prune_it: Callable[[Path, Path], Path] | None
) -> None:
    folder = save_tiny_llama(tmp_path / "dense", **changes)
    if prune_it:
        folder = prune_it(folder, tmp_path / "pruned")
    model = load_model(folder)
    model.set_attn_implementation("eager")  # plain products, which the counter knows
    with torch.inference_mode():
        cached = model(torch.arange(6)[None], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(torch.tensor([[6]]), past_key_values=cached, use_cache=True)
    counts = counter.get_flop_counts()
    rotary = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith("rotary_emb"))
    found = count_costs(folder, LOAD)
    assert found.linear_flops + found.attention_flops == counter.get_total_flops() - rotary


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
    one, other = count_costs(pruned, LOAD), count_costs(tiny, LOAD)
    for row in rows:
        assert (row.prompt_tokens, row.new_tokens, row.repeats, row.device, row.dtype) == (5, 3, 5, "cpu", "float32")
        assert row.parameters == (one if row.role == "checkpoint" else other).parameters
        assert row.prefill_tokens_per_second > 0
        assert row.decode_tokens_per_second > 0
        assert row.peak_memory_bytes >= row.base_memory_bytes > 0
        if row.role == "checkpoint":
            assert row.expected_prefill == other.prompt_flops / one.prompt_flops > 1
            assert row.expected_parameters == other.computed_parameters / one.computed_parameters > 1
            expected = (other.linear_flops + other.attention_flops) / (one.linear_flops + one.attention_flops)
            assert row.expected_decode == expected > 1
            for phase in ("prefill", "decode"):
                low, middle, high = (getattr(row, f"{phase}_speedup{end}") for end in ("_low", "", "_high"))
                assert 0 < low <= middle <= high
        else:
            assert row.decode_speedup is row.expected_prefill is row.expected_parameters is None


def test_the_command_writes_one_table_and_prints_it(profiled: tuple[Path, str], rows: list[ProfileRow]) -> None:
    out, shown = profiled
    assert [path.name for path in out.iterdir()] == ["profile.parquet"]
    mine, _, other, _ = rows
    ratio = other.parameters / mine.parameters
    assert re.search(rf"parameters +{mine.parameters:,} +{other.parameters:,} +{ratio:.2f} *\n", shown)
    assert f"{mine.expected_prefill:.2f} / {mine.expected_parameters:.2f}" in shown
    assert "5 tokens a prompt, 3 new ones; median of 5; cpu, " in shown


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
    assert len(re.findall(r"parameters +70,553,706,496 +70,553,706,496 +1\.00", shown)) == 1
    assert shown.count("1.50 (1.25–11.75)") == 4
    assert "…" not in shown


def test_one_checkpoint_alone_has_no_ratios(rows: list[ProfileRow]) -> None:
    shown = printed([replace(row, role="checkpoint") for row in rows if row.role == "against"])
    assert re.search(rf"parameters +{rows[-1].parameters:,} *\n", shown)
    assert "batch 1" in shown
    assert "atio" not in shown


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
    def exhausted(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(profiling, "decode", exhausted)
    with pytest.raises(InputError, match=r"batch: got 64; allowed: fewer prompts \(.* ran out of memory\)"):
        profiling._measure(tiny, "cpu", 64, LOAD)
    with (
        ProcessPoolExecutor(1, get_context("spawn"), os._exit, (9,)) as killed,
        pytest.raises(InputError, match=r"batch: got 64; allowed: fewer prompts \(the process of here died"),
    ):
        profiling._ask(killed, Path("here"), "cpu", 64, LOAD)
