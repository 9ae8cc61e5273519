"""Many documents through a model, streamed or not: pass after pass, or layer after layer."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from tailored_llama.memory import out_of_memory
from tailored_llama.models import packing
from tailored_llama.models.attention import Header
from tailored_llama.models.devices import passes_at_once, threads_each, using_threads
from tailored_llama.models.packing import Document
from tailored_llama.models.streaming import enter, layers_of

Result = TypeVar("Result")

# A sweep over a streamed model's layers reads all weights: seconds for LLaMA-7B, whose hidden states then take 2 GB.
_SWEEP_TOKENS = 2**18
_LEAST_TOKENS = 256  # of a pass that runs beside others: with fewer, reading the weights takes most of the time


@dataclass(frozen=True)
class Encoded:
    """A prompt as tokens: the packed document, and the positions in it and targets at which every choice is scored."""

    document: Document
    positions: Sequence[Sequence[int]]
    targets: Sequence[Sequence[int]] = ()
    truncated: bool = False  # whether a choice lost the start of its context

    def after(self, header: int) -> Self:
        """A copy without the first `header` tokens, which are encoded separately."""
        document = Document(self.document.prefix[header:], self.document.branches)
        positions = [[p - header for p in choice] for choice in self.positions]
        return replace(self, document=document, positions=positions)


@dataclass(frozen=True)
class PackedRow:
    """Documents that share a row, the positions in it whose states are wanted, and the token to score after each."""

    documents: Sequence[Document]
    positions: Sequence[int]
    targets: Sequence[int] = ()


Finish = Callable[[PackedRow, Tensor], Result]


def row_of(items: Sequence[Encoded]) -> PackedRow:
    """Pack prompts, with the positions and targets of all their choices."""
    positions: list[int] = []
    start = 0
    for item in items:
        positions += [start + p for choice in item.positions for p in choice]
        start += len(item.document)
    targets = [target for item in items for choice in item.targets for target in choice]
    return PackedRow([item.document for item in items], positions, targets)


def run_packed(
    model: Any, items: Sequence[Encoded], budget: int, finish: Finish[Result], shared: Sequence[int] = ()
) -> Iterator[tuple[list[int], Result]]:
    """Run documents in packed rows of at most `budget` tokens, as `within_memory`; yields batches and their results.

    `model` is inside `packed_attention`; each layer of a streamed one is read once for many rows. The token ids
    `shared` precede every document. `finish` makes a result of a row and its states at `distinct(row.positions)`.
    """
    lengths = [packing.tokens_read(model, item.document, len(shared)) for item in items]
    at_once = passes_at_once(model, budget)
    if at_once > 1:  # few documents are enough for as many shorter passes
        budget = min(budget, max(_LEAST_TOKENS, math.ceil(sum(lengths) / at_once)))
    if layers_of(model).streamed:
        yield from _sweeps(model, items, budget, finish, shared, threads_each(at_once))
        return
    header = packing.encode_header(model, shared, budget)

    def run(batch: list[int]) -> Result:
        row = row_of([items[i] for i in batch])
        return finish(row, packing.packed_states(model, row.documents, packing.distinct(row.positions), header))

    yield from packing.within_memory(lengths, budget, run, at_once=at_once)


def _sweeps(
    model: Any, items: Sequence[Encoded], budget: int, finish: Finish[Result], shared: Sequence[int], threads: int
) -> Iterator[tuple[list[int], Result]]:
    """`run_packed` of a streamed model: as many rows at once as `_SWEEP_TOKENS` allow, one layer after the other."""
    lengths = [len(item.document) for item in items]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        parts = [[order[i] for i in part] for part in packing.batches([lengths[i] for i in order], budget)]
        tokens = [sum(lengths[i] for i in part) for part in parts]
        parts = parts[: len(packing.batches(tokens, _SWEEP_TOKENS)[0])]
        rows = [row_of([items[i] for i in part]) for part in parts]
        results = []
        try:
            for row, states in zip(rows, _states(model, rows, budget, shared, threads), strict=True):
                with using_threads(threads):
                    results.append(finish(row, states))
        except (RuntimeError, MemoryError) as error:
            if max(map(len, parts)) == 1 or not out_of_memory(error):
                raise
            budget = packing.halved(max(tokens))
            continue
        yield from zip(parts, results, strict=True)
        order = order[sum(map(len, parts)) :]


def _states(
    model: Any, rows: Sequence[PackedRow], budget: int, shared: Sequence[int], threads: int
) -> Iterator[Tensor]:
    """The states of every row at its distinct positions; each layer is read once, and begins with the shared start."""
    layers, header, all_threads = layers_of(model), Header(), torch.get_num_threads()
    passes: list[dict[str, Any]] = []
    headers: list[Header] = []
    for start in range(0, len(shared), budget):
        part = Document(shared[start : start + budget])
        headers.append(Header(header.length + len(part)))
        passes.append(packing.packed_inputs(model, [part], header, headers[-1]))
        header = headers[-1]
    passes += [packing.packed_inputs(model, row.documents, header) for row in rows]
    with layers.shelf() as shelf:
        arguments = []
        for index, inputs in enumerate(passes):
            shelf[index], further = enter(model, **inputs)
            arguments.append(further)
        for number, layer in layers.each():
            for index, further in enumerate(arguments):
                with using_threads(all_threads if index < len(headers) else threads):
                    shelf[index] = layer(shelf[index], **further[number])
            for encoded in headers:
                del encoded.states[number]  # all rows have seen this layer's
        for index, row in enumerate(rows, start=len(headers)):
            states = model.get_decoder().norm(shelf[index])
            yield states[0, packing.distinct(row.positions).to(states.device)]
