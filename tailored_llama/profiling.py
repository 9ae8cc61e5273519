"""What a checkpoint costs to run, and how much less than another: parameters, FLOPs, tokens per second, memory.

Each checkpoint is measured in a process of its own, which has its weights alone in memory; two of them take turns, so
that what else a machine does meanwhile slows both.
"""

from __future__ import annotations

import dataclasses
import math
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
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig

from tailored_llama.artifacts import read_table, schema_of, write_table
from tailored_llama.checkpoints import check_checkpoint, read_structure, tensor_shapes, weight_files
from tailored_llama.console import quiet_libraries
from tailored_llama.errors import InputError
from tailored_llama.memory import out_of_memory, peak_memory, reset_peak_memory
from tailored_llama.models import load, pick_device
from tailored_llama.progress import Progress, silent

BATCHES = (1, 8)
REPEATS = 5


@dataclass(frozen=True)
class Work:
    """What a pass does with each of its prompts; the first new token comes with the prompt, the others by decoding."""

    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Costs:
    """What a checkpoint costs by its shapes alone, as `count_costs` counts it."""

    parameters: int
    computed_parameters: int
    weight_bytes: int
    linear_flops: int
    attention_flops: int
    prompt_flops: int


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


def count_costs(folder: Path, work: Work) -> Costs:
    """Count what a checkpoint costs, from the headers of its files.

    - `parameters`: all that are stored, tied ones once.
    - `computed_parameters`: without an input embedding that is not the output head too, of which a token reads one row.
    - `linear_flops`, of one decoded token: 2 × the entries of all matrices of the layers and of the head.
    - `attention_flops`, of the last decoded token: Σ over layers of 4 × heads × head_dim × seen (2 for scores, 2 for
      values), where seen is prompt_tokens + new_tokens − 1, itself counted, or the layer's sliding window if less.
    - `prompt_flops`, of one prompt: the layers' matrices for each token, the head's for the last one, and attention to
      what each token sees.

    Norms, biases, softmax and activations are not counted: they are linear in what is.

    Raises:
        InputError: the checkpoint is broken or not supported.
    """
    structure = read_structure(folder)
    files = weight_files(folder)
    shapes = {name: shape for file in files for name, shape in tensor_shapes(file).items()}
    if (embedding := shapes.get("model.embed_tokens.weight")) is None:
        raise InputError(f"{folder}: tensor 'model.embed_tokens.weight' is missing from its safetensors")
    head = math.prod(embedding)
    inner = sum(math.prod(s) for name, s in shapes.items() if name.startswith("model.layers.") and len(s) == 2)
    config = _config(folder)
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)  # absent, a window is that of all layers
    context, last, prompt = work.prompt_tokens + work.new_tokens - 1, 0, 0
    for index, layer in enumerate(structure.layers):
        local = kinds is None or kinds[index] == "sliding_attention"
        widest = window if local and window is not None else context
        each = 4 * layer.heads * structure.head_dim
        last += each * min(context, widest)
        prompt += each * sum(min(seen, widest) for seen in range(1, work.prompt_tokens + 1))
    return Costs(
        parameters=structure.parameters,
        computed_parameters=structure.parameters - (head if "lm_head.weight" in shapes else 0),
        weight_bytes=sum(file.stat().st_size for file in files),
        linear_flops=2 * (inner + head),
        attention_flops=last,
        prompt_flops=2 * (inner * work.prompt_tokens + head) + prompt,
    )


def _config(folder: Path) -> Any:
    """The configuration with its defaults, as the model reads it."""
    check_checkpoint(folder)
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many types for fields it does not like
        raise InputError(f"{folder / 'config.json'}: cannot be read ({' '.join(str(error).split())[:200]})") from None


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
    configs = {role: _config(folder) for role, folder in folders.items()}
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
        "expected_decode": _token_flops(other) / _token_flops(mine),
        "expected_parameters": other.computed_parameters / mine.computed_parameters,
    }
    pairs = list(zip(passes["checkpoint"], passes["against"], strict=True))[1:]
    for phase in ("prefill", "decode"):
        ratios = [getattr(slow, phase) / getattr(quick, phase) for quick, slow in pairs]
        found[f"{phase}_speedup"] = median(ratios)
        found |= {f"{phase}_speedup_low": min(ratios), f"{phase}_speedup_high": max(ratios)}
    return found


def _token_flops(costs: Costs | Row) -> int:
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


def console_table(rows: Sequence[Row]) -> Table:
    """The table for a terminal of 80 characters: a column for each checkpoint, then what the one costs ÷ the other."""
    mine, other = ([row for row in rows if row.role == role] for role in ("checkpoint", "against"))
    first = [found[0] for found in (mine, other) if found]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption_justify="left")
    table.caption, table.caption_style = escape("\n".join(_notes(first))), "none"
    table.add_column("", no_wrap=True)
    for row in first:
        table.add_column(escape(row.checkpoint), justify="right", overflow="fold")
    for name in ("ratio", "expected") if other else ():
        table.add_column(name, justify="right", no_wrap=True)
    for label, scale, digits, values in (
        ("parameters", 1, 0, [row.parameters for row in first]),
        ("  a token needs", 1, 0, [row.computed_parameters for row in first]),
        ("weights, MB", 1e6, 1, [row.weight_bytes for row in first]),
        ("MFLOPs a token", 1e6, 1, [_token_flops(row) for row in first]),
        ("  in attention", 1e6, 1, [row.attention_flops for row in first]),
        ("MFLOPs a prompt", 1e6, 1, [row.prompt_flops for row in first]),
    ):
        table.add_row(label, *(f"{value / scale:,.{digits}f}" for value in values), *_ratio(values))
    for index, row in enumerate(mine):
        both = [found[index] for found in (mine, other) if found]
        table.add_section()
        table.add_row(f"[bold]batch {row.batch}[/]")
        for phase in ("prefill", "decode"):
            cells = [f"{getattr(one, f'{phase}_tokens_per_second'):,.1f}" for one in both]
            if row.expected_parameters is not None:
                middle, low, high = (getattr(row, f"{phase}_speedup{end}") for end in ("", "_low", "_high"))
                expected = getattr(row, f"expected_{phase}")
                cells += [f"{middle:.2f} ({low:.2f}–{high:.2f})", f"{expected:.2f} / {row.expected_parameters:.2f}"]
            table.add_row(f"  {phase} tokens/s", *cells)
        memory = [one.peak_memory_bytes for one in both]
        table.add_row("  peak memory, MB", *(f"{value / 1e6:,.0f}" for value in memory), *_ratio(memory))
    return table


def _ratio(values: Sequence[int]) -> list[str]:
    """The cell of other ÷ mine, where there is another."""
    return [f"{values[1] / values[0]:.2f}"] if len(values) == 2 and values[0] else []


def _notes(rows: Sequence[Row]) -> list[str]:
    """What was measured, and how to read it."""
    row = rows[0]
    where = f"{row.threads} thread{'s' * (row.threads > 1)}" if row.device == "cpu" else ""
    setting = ", ".join(filter(None, [row.device, where, " and ".join(dict.fromkeys(r.dtype for r in rows))]))
    base = " and ".join(dict.fromkeys(f"{r.base_memory_bytes / 1e6:,.0f}" for r in rows))
    notes = [
        f"{row.prompt_tokens} tokens a prompt, {row.new_tokens} new ones; median of {row.repeats}; {setting}.",
        f"Memory is the process's, {base} MB of it interpreter and libraries."
        if row.device == "cpu"
        else "Memory is what torch allocated.",
    ]
    if len(rows) > 1:
        notes += [
            "Ratio: the second's cost ÷ the first's; median and range of pairs.",
            "Expected: the same of FLOPs / of the parameters that a token needs.",
        ]
    return notes
