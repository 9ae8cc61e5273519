"""Measuring what a checkpoint costs to run, and how much less than another: tokens per second, memory.

Each checkpoint is measured in a process of its own, which has its weights alone in memory; two of them take turns, so
that what else a machine does meanwhile slows both.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tailored_llama.artifacts import read_table, schema_of, write_table
from tailored_llama.console import quiet_libraries
from tailored_llama.costs import Costs, Work, count_costs, model_config
from tailored_llama.errors import InputError
from tailored_llama.memory import out_of_memory, peak_memory, reset_peak_memory
from tailored_llama.models import load, pick_device
from tailored_llama.progress import Progress, silent

BATCHES = (1, 8)
REPEATS = 5


@dataclass(frozen=True)
class Pass:
    """One pass: seconds of the prompts and of decoding; bytes at most, and before the checkpoint was loaded."""

    prefill: float
    decode: float
    peak_memory: int
    base_memory: int


@dataclass(frozen=True)
class Row:
    """One row of `profile.parquet`: a checkpoint at a batch size.

    Every ratio is the other checkpoint's cost ÷ this one's, above 1 where this one costs less; rows of the other have
    none. A speed-up is the median over pairs of neighbouring passes, `_low` and `_high` the least and the greatest of
    them. Expected is the same ratio of FLOPs, which is what to hope for where arithmetic is the limit, and of the
    parameters that a token needs, where reading weights is.
    """

    role: str  # checkpoint or against
    checkpoint: str
    parameters: int
    computed_parameters: int
    weight_bytes: int
    linear_flops: int
    attention_flops: int
    prompt_flops: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    device: str
    threads: int  # of the CPU
    dtype: str
    prefill_tokens_per_second: float  # medians; of all prompts of a batch together
    decode_tokens_per_second: float
    peak_memory_bytes: int
    base_memory_bytes: int  # of it, what there was before the checkpoint: the interpreter and libraries; CUDA: 0
    prefill_speedup: float | None = None
    prefill_speedup_low: float | None = None
    prefill_speedup_high: float | None = None
    decode_speedup: float | None = None
    decode_speedup_low: float | None = None
    decode_speedup_high: float | None = None
    expected_prefill: float | None = None  # by FLOPs
    expected_decode: float | None = None  # by FLOPs
    expected_parameters: float | None = None  # by computed parameters


PROFILE_SCHEMA = schema_of(Row)


def decode(model: Any, ids: Tensor, new_tokens: int) -> tuple[Tensor, float, float]:
    """Continue prompts greedily by the model's own forward and cache, past any end-of-text token.

    Args:
        ids: prompts of one length, int64 [batch, prompt_tokens].

    Returns:
        The new tokens, int64 [batch, new_tokens]; seconds of the first, and of all others.
    """
    with torch.inference_mode():
        start = _clock(model)
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        tokens = [output.logits[:, -1:].argmax(-1)]
        first = _clock(model)
        while len(tokens) < new_tokens:
            cached = output.past_key_values
            output = model(input_ids=tokens[-1], past_key_values=cached, use_cache=True, logits_to_keep=1)
            tokens.append(output.logits[:, -1:].argmax(-1))
        return torch.cat(tokens, dim=1), first - start, _clock(model) - first


def _clock(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def profile(
    checkpoint: Path,
    against: Path | None = None,
    batches: Sequence[int] = BATCHES,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    device: str = "auto",
    repeats: int = REPEATS,
    progress: Progress = silent,
) -> list[Row]:
    """Measure a checkpoint, and another in turns with it: a row for each of them and each batch size.

    A pass prefills random prompts of one length and decodes greedily. At each batch size there is one to warm up, then
    `repeats` that are timed. Peak memory is that of these passes, the weights in it and loading them not; on a CPU the
    process's resident high-water mark, on CUDA what torch allocated.

    The processes are spawned: a script that calls this needs `if __name__ == "__main__":`.

    Raises:
        InputError: a number is out of bounds, a checkpoint is broken, the device is not there, or memory runs out.
    """
    for field, values, least in (
        ("batch", batches, 1),
        ("prompt_tokens", [prompt_tokens], 1),
        ("new_tokens", [new_tokens], 2),
        ("repeats", [repeats], 1),
    ):
        if wrong := [value for value in values if value < least]:
            raise InputError(f"{field}: got {wrong[0]}; allowed: at least {least}")
    place, work = pick_device(device), Work(prompt_tokens, new_tokens)
    folders = {"checkpoint": checkpoint} | ({"against": against} if against is not None else {})
    configs = {role: model_config(folder) for role, folder in folders.items()}
    for role, config in configs.items():
        if prompt_tokens + new_tokens > (limit := config.max_position_embeddings):
            raise InputError(
                f"prompt_tokens + new_tokens: got {prompt_tokens + new_tokens}; allowed: at most {limit}, the context "
                f"of {folders[role]}"
            )
    costs = {role: count_costs(folder, work) for role, folder in folders.items()}
    rows: list[Row] = []
    with ExitStack() as stack:
        workers = {role: stack.enter_context(_process()) for role in folders}
        done, total = 0, len(set(batches)) * (repeats + 1) * len(folders)
        for batch in sorted(set(batches)):  # ascending: what a larger batch leaves behind would count for a smaller
            passes: dict[str, list[Pass]] = {role: [] for role in folders}
            for turn in range(repeats + 1):
                for role in list(folders)[:: -1 if turn % 2 else 1]:  # neither always comes first
                    passes[role].append(_ask(workers[role], folders[role], place, batch, work))
                    progress(done := done + 1, total)
            rows += [
                Row(
                    role,
                    str(folder),
                    **dataclasses.asdict(costs[role]),
                    batch=batch,
                    **dataclasses.asdict(work),
                    repeats=repeats,
                    device=place,
                    threads=torch.get_num_threads(),
                    dtype=str(configs[role].dtype or torch.float32).removeprefix("torch."),
                    prefill_tokens_per_second=batch * prompt_tokens / median(p.prefill for p in passes[role][1:]),
                    decode_tokens_per_second=batch * (new_tokens - 1) / median(p.decode for p in passes[role][1:]),
                    peak_memory_bytes=max(p.peak_memory for p in passes[role]),
                    base_memory_bytes=passes[role][0].base_memory,
                    **(_ratios(costs, passes) if role == "checkpoint" and against is not None else {}),
                )
                for role, folder in folders.items()
            ]
    return sorted(rows, key=lambda row: (row.role != "checkpoint", row.batch))


def _ratios(costs: dict[str, Costs], passes: dict[str, list[Pass]]) -> dict[str, Any]:
    """Speed-ups, measured and expected, as fields of a row."""
    mine, other = costs["checkpoint"], costs["against"]
    found: dict[str, Any] = {
        "expected_prefill": other.prompt_flops / mine.prompt_flops,
        "expected_decode": token_flops(other) / token_flops(mine),
        "expected_parameters": other.computed_parameters / mine.computed_parameters,
    }
    pairs = list(zip(passes["checkpoint"], passes["against"], strict=True))[1:]
    for phase in ("prefill", "decode"):
        ratios = [getattr(slow, phase) / getattr(quick, phase) for quick, slow in pairs]
        found[f"{phase}_speedup"] = median(ratios)
        found |= {f"{phase}_speedup_low": min(ratios), f"{phase}_speedup_high": max(ratios)}
    return found


def token_flops(costs: Costs | Row) -> int:
    """FLOPs of the last decoded token."""
    return costs.linear_flops + costs.attention_flops


def _process() -> ProcessPoolExecutor:
    """A fresh process that does one thing at a time; spawned, since CUDA does not survive a fork."""
    return ProcessPoolExecutor(1, get_context("spawn"), _start, (torch.get_num_threads(),))


def _start(threads: int) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)


def _ask(worker: ProcessPoolExecutor, folder: Path, device: str, batch: int, work: Work) -> Pass:
    try:
        return worker.submit(_measure, folder, device, batch, work).result()
    except BrokenProcessPool as error:
        raise InputError(
            f"batch: got {batch}; allowed: fewer (the process of {folder} was ended, as where memory runs out)"
        ) from error


def _measure(folder: Path, device: str, batch: int, work: Work) -> Pass:
    """One pass, in the checkpoint's own process."""
    try:
        model, base = _loaded(folder, device)
        seeded = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (batch, work.prompt_tokens), generator=seeded).to(model.device)
        _restart_peak(model.device)
        _, prefill, rest = decode(model, ids, work.new_tokens)
        return Pass(prefill, rest, _peak(model.device), base)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"batch: got {batch}; allowed: fewer (memory ran out with {folder})") from None


@cache
def _loaded(folder: Path, device: str) -> tuple[Any, int]:
    """The process's model, and the bytes that the process had before."""
    place = torch.device(device)
    _restart_peak(place)
    base = _peak(place)
    return load(folder, device=device), base


def _restart_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak_memory()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def write_profile(rows: Sequence[Row], out: Path) -> None:
    """Write `profile.parquet`."""
    columns = {name: [getattr(row, name) for row in rows] for name in PROFILE_SCHEMA.names}
    write_table(out / "profile.parquet", columns, PROFILE_SCHEMA)


def read_profile(folder: Path) -> list[Row]:
    """The rows of `profile.parquet`."""
    return [Row(**row) for row in read_table(folder / "profile.parquet", PROFILE_SCHEMA).to_pylist()]
