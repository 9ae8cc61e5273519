"""Passes side by side in the threads of a CPU.

A product of a small model takes two threads hardly less time than one, as they wait for each other. Two passes of one
thread each use both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from tailored_llama.models import libraries  # noqa: F401 - before torch

Part = TypeVar("Part")
Result = TypeVar("Result")

# Multiplications of one projection (tokens × hidden²) that are worth another thread: where that thread could compute
# another pass instead, and where it would have nothing else to do. With fewer of them, the threads of a pass wait for
# each other at every small operation for longer than they compute.
_OF_MANY, _OF_ONE = 2**29, 2**27
_AT_MOST = 16  # passes at once, each with activations of its own


def passes_at_once(model: Any, tokens: int) -> int:
    """How many passes, with this number of tokens each, keep the threads of a CPU busy; one on other devices."""
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    kinds = str(getattr(rotary, "rope_type", ""))  # one, or one for each type of layer
    if model.device.type != "cpu" or "longrope" in kinds or "dynamic" in kinds:  # each pass sets their frequencies
        return 1
    threads, width = torch.get_num_threads(), int(model.get_input_embeddings().weight.shape[1])
    return min(_AT_MOST, threads // min(threads, max(1, tokens * width**2 // _OF_MANY)))


def threads_each(at_once: int) -> int:
    """Each pass's share of the threads; the last one has no more, although it may run alone: all are computed alike."""
    return max(1, torch.get_num_threads() // at_once)


def busy_threads(model: Any, tokens: int) -> int:
    """How many of a CPU's threads a single pass over this number of tokens keeps busy; all on other devices."""
    threads, width = torch.get_num_threads(), int(model.get_input_embeddings().weight.shape[1])
    return min(threads, max(1, tokens * width**2 // _OF_ONE)) if model.device.type == "cpu" else threads


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for what this thread computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(run: Callable[[Part], Result], parts: Sequence[Part], threads: int) -> list[Result]:
    """Call a function with all parts at once, `threads` of torch's threads for each.

    Raises:
        Exception: the first one, in the order of the parts, once all have ended.
    """
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()  # of this thread alone

    def alone(part: Part) -> Result:
        torch.set_num_threads(threads)
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return run(part)

    with using_threads(threads):
        if len(parts) == 1:
            return [run(parts[0])]
        with ThreadPoolExecutor(len(parts)) as pool:
            return list(pool.map(alone, parts))
