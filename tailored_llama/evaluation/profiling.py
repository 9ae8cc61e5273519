"""Measure what a checkpoint costs to run, alone or compared with another: tokens per second and memory."""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import chain, count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from tailored_llama import models
from tailored_llama.config import ProfileConfig, Work
from tailored_llama.console import quiet_libraries
from tailored_llama.errors import InputError, one_line
from tailored_llama.evaluation.results import ProfileRow
from tailored_llama.evaluation.settings import ProfileSettings
from tailored_llama.memory import out_of_memory, peak_memory, reset_peak_memory
from tailored_llama.processes import forking
from tailored_llama.store import write_rows


@dataclass(frozen=True)
class Pass:
    """The time and memory of one pass."""

    prefill: float  # seconds
    decode: float
    peak_memory: int  # bytes
    base_memory: int  # before the checkpoint was loaded


def decode(model: Any, ids: Tensor, new_tokens: int) -> tuple[Tensor, float, float]:
    """Continue prompts, int64 [batch, prompt_tokens], greedily with the model's own layers, past any end-of-text token.

    The head reads the last states as one matrix. With `logits_to_keep` and several prompts, torch on a CPU copies the
    head's weights for every prompt, which takes longer than all layers.

    Returns:
        The new tokens, int64 [batch, new_tokens]; seconds for the first one; seconds for all others.
    """
    decoder = model.get_decoder()
    with torch.inference_mode():
        start = _clock(model)
        output = decoder(input_ids=ids, use_cache=True)
        tokens = [_next_tokens(model, output)]
        first = _clock(model)
        while len(tokens) < new_tokens:
            output = decoder(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True)
            tokens.append(_next_tokens(model, output))
        return torch.cat(tokens, dim=1), first - start, _clock(model) - first


def _next_tokens(model: Any, output: Any) -> Tensor:
    return models.head_logits(model, output.last_hidden_state[:, -1]).argmax(-1, keepdim=True)


def _clock(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def profile_checkpoint(checkpoint: Path, against: Path | None = None, *, settings: ProfileSettings, work: Work) -> None:
    """Stage: measure a checkpoint, optionally in turns with another, such as the dense one; write `profile.parquet`.

    There is a row for each checkpoint and batch size. A pass prefills random prompts of one length and decodes
    greedily. At each batch size one pass warms up, then `repeats` are timed. Two checkpoints take turns, so that other
    load on the machine slows both. Peak memory covers these passes with the weights, but not loading: on a CPU the
    process's resident high-water mark, on CUDA what torch allocated.

    Each checkpoint has a process of its own: a script that calls this needs `if __name__ == "__main__":`.

    Raises:
        InputError: a checkpoint is broken or its context too short, the device is not available, or memory runs out.
    """
    profile, device = settings.profile, models.pick_device(settings.device)
    folders = {"checkpoint": checkpoint} | ({"against": against} if against is not None else {})
    names = settings.labels or map(str, folders.values())
    facts = {role: _facts(folders[role]) | {"checkpoint": name} for role, name in zip(folders, names, strict=False)}
    _check_contexts(folders.values(), profile)
    rows: dict[str, list[ProfileRow]] = {role: [] for role in folders}
    measured = profile.model_dump(exclude={"batches"}) | {"device": device, "threads": torch.get_num_threads()}
    with ExitStack() as stack:
        workers = {role: stack.enter_context(_process()) for role in folders}
        for role, worker in workers.items():  # both load at the same time; its first pass tells of one that cannot
            worker.submit(_load, folders[role], device)
        batches = sorted(set(profile.batches))
        done, total = count(1), len(batches) * (profile.repeats + 1) * len(folders)
        for batch in batches:  # ascending: a larger batch leaves memory that would count for a smaller one
            passes: dict[str, list[Pass]] = {role: [] for role in folders}
            for turn in range(profile.repeats + 1):
                for role in list(folders)[:: -1 if turn % 2 else 1]:  # neither always goes first
                    passes[role].append(_ask(workers[role], folders[role], device, batch, profile))
                    work.progress(next(done), total)
            for role, own in passes.items():
                figures = _figures(own, batch, profile)
                if role == "checkpoint" and against is not None:
                    figures |= _speedups(passes)
                rows[role].append(ProfileRow(role=role, batch=batch, **facts[role], **measured, **figures))
    write_rows(work.out / "profile.parquet", [*chain(*rows.values())], ProfileRow)


def _facts(folder: Path) -> dict[str, Any]:
    """What is known of a checkpoint without running it, as fields of a row."""
    facts = {"parameters": models.read_structure(folder).parameters, "weight_bytes": models.weight_bytes(folder)}
    return facts | {"dtype": str(models.stored_dtype(folder)).removeprefix("torch.")}


def _check_contexts(folders: Iterable[Path], profile: ProfileConfig) -> None:
    """Check that the context of each checkpoint, stated or its model class's, holds prompt and answer."""
    tokens = profile.prompt_tokens + profile.new_tokens
    for folder in folders:
        try:
            limit = int(AutoConfig.from_pretrained(folder).max_position_embeddings)
        except Exception as error:  # transformers raises many types for invalid fields
            raise InputError(f"{folder / 'config.json'}: cannot be read ({one_line(error)[:200]})") from None
        if tokens > limit:
            told = f"allowed: at most {limit}, the context of {folder}"
            raise InputError(f"prompt_tokens + new_tokens: got {tokens}; {told}")


def _figures(passes: Sequence[Pass], batch: int, profile: ProfileConfig) -> dict[str, Any]:
    """Speed and memory, as fields of a row; the first pass is not timed."""
    reading, writing = batch * profile.prompt_tokens, batch * (profile.new_tokens - 1)
    return {
        "prefill_tokens_per_second": reading / median(own.prefill for own in passes[1:]),
        "decode_tokens_per_second": writing / median(own.decode for own in passes[1:]),
        "peak_memory_bytes": max(own.peak_memory for own in passes),
        "base_memory_bytes": passes[0].base_memory,
    }


def _speedups(passes: dict[str, list[Pass]]) -> dict[str, Any]:
    """The measured speed-ups as fields of a row."""
    fields: dict[str, Any] = {}
    pairs = list(zip(passes["checkpoint"], passes["against"], strict=True))[1:]
    for phase in ("prefill", "decode"):
        ratios = [getattr(slow, phase) / getattr(quick, phase) for quick, slow in pairs]
        fields[f"{phase}_speedup"] = median(ratios)
        fields[f"{phase}_speedup_low"], fields[f"{phase}_speedup_high"] = min(ratios), max(ratios)
    return fields


def _process() -> ProcessPoolExecutor:
    """A fresh process that handles one call at a time."""
    return ProcessPoolExecutor(1, forking(), _start, (torch.get_num_threads(),))


def _start(threads: int) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)


def _ask(worker: ProcessPoolExecutor, folder: Path, device: str, batch: int, profile: ProfileConfig) -> Pass:
    try:
        return worker.submit(_measure, folder, device, batch, profile).result()
    except BrokenProcessPool as error:
        raise InputError(
            f"batch: got {batch}; allowed: fewer prompts (the process of {folder} died, probably out of memory)"
        ) from error


def _measure(folder: Path, device: str, batch: int, profile: ProfileConfig) -> Pass:
    """Run one pass, in the checkpoint's own process, which loads it first."""
    said = f"checkpoint: got {folder}; allowed: one that fits into memory"
    try:
        model, base = _loaded(folder, device)
        said = f"batch: got {batch}; allowed: fewer prompts ({folder} ran out of memory)"
        seeded = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (batch, profile.prompt_tokens), generator=seeded).to(model.device)
        _restart_peak(device)
        _, prefill, rest = decode(model, ids, profile.new_tokens)
        return Pass(prefill, rest, _peak(device), base)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(said) from None


@cache
def _loaded(folder: Path, device: str) -> tuple[Any, int]:
    """The process's model, and the bytes that the process used before loading it."""
    _restart_peak(device)
    base = _peak(device)
    return models.load_model(folder, device=device), base


def _load(folder: Path, device: str) -> None:
    _loaded(folder, device)


def _restart_peak(device: str) -> None:
    for each in models.devices_of(device):
        if each == "cpu":
            reset_peak_memory()
        else:
            torch.cuda.reset_peak_memory_stats(each)


def _peak(device: str) -> int:
    return sum(
        peak_memory() if each == "cpu" else torch.cuda.max_memory_allocated(each) for each in models.devices_of(device)
    )
