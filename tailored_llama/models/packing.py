"""Packed rows: many sequences in one row, where linear layers see all tokens and attention stays within a document.

A document is a prefix and branches that continue it, such as a context and its choices; the prefix is encoded once.
A header, such as the solved examples of a benchmark, is encoded once for all documents. The model is
transformers' own: an attention function that is registered with it (`attention.py`) reads the blocks of the row.

Layers that are not known might mix the texts of a row. A model with such layers reads every sequence as a row.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from tailored_llama.memory import out_of_memory
from tailored_llama.models.attention import ATTENTION, Block, Header, Row
from tailored_llama.models.devices import HEAD_POSITIONS, side_by_side, threads_each
from tailored_llama.models.families import family_of
from tailored_llama.models.load import head_logits

Result = TypeVar("Result")

# For bfloat16 on a CPU, oneDNN compiles a kernel for each pair of row length and matrix shape, and keeps 1,024 of them.
# Rows of few lengths find their kernels compiled.
_ROW_MULTIPLE = 32
_PROBABILITY_ROWS = 8  # on a CPU: with more, memory of this size is freed and faulted in again, which takes longer


@dataclass(frozen=True)
class Document:
    """The token ids that all branches share, and the further token ids of each branch (none, one or several)."""

    prefix: Sequence[int]
    branches: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))

    def offset(self, branch: int, position: int) -> int:
        """Index, within the packed document, of token `position` of the sequence prefix + branch."""
        if position < len(self.prefix):
            return position
        return position + sum(map(len, self.branches[:branch]))


def token_budget(batch_tokens: int | None, model: Any) -> int:
    """Tokens per pass: as configured, else enough to make full use of the model's device."""
    # On a CPU, larger passes free and re-fault the memory of every layer, which costs more time per token.
    return batch_tokens or (16_384 if model.device.type == "cuda" else 1_024)


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split documents, by index, into parts of at most `budget` tokens; a longer document is a part of its own."""
    return [list(part) for part in _parts(lengths, budget)]


def _parts(lengths: Sequence[int], budget: int, start: int = 0, padded: bool = False) -> Iterator[range]:
    while start < len(lengths):
        stop, used = start + 1, lengths[start]
        while stop < len(lengths) and (used := used + lengths[start if padded else stop]) <= budget:
            stop += 1
        yield range(start, stop)
        start = stop


def within_memory(
    lengths: Sequence[int], budget: int, run: Callable[[list[int]], Result], padded: bool = False, at_once: int = 1
) -> Iterator[tuple[list[int], Result]]:
    """Run batches of documents, longest first, with at most `budget` tokens each (but at least one document).

    `at_once` batches run side by side. When memory runs out, the remaining batches run one after another, and then with
    half the budget, down to a single document. If `padded`, each document counts as long as the longest of its batch.
    Yields every batch, as indices of documents, and its result.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    ordered = [lengths[i] for i in order]
    start = 0
    while start < len(order):
        parts = list(islice(_parts(ordered, budget, start, padded), at_once))
        stop, wave = parts[-1].stop, [[order[i] for i in part] for part in parts]
        try:
            results = side_by_side(run, wave, threads_each(at_once))
        except (RuntimeError, MemoryError) as error:
            if len(wave) == len(wave[0]) == 1 or not out_of_memory(error):
                raise
            if len(wave) > 1:
                at_once = 1
                logging.getLogger(__name__).warning("memory ran out: going on with one pass at a time")
            else:
                budget = halved(ordered[start] * len(wave[0]) if padded else sum(ordered[start:stop]))
            continue
        yield from zip(wave, results, strict=True)
        start = stop


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Let a transformers or PEFT model read packed rows inside the `with` block, if it can."""
    if not can_pack(model):
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def can_pack(model: Any) -> bool:
    """Whether a model's layers are known to keep the texts of a packed row apart."""
    return family_of(model.config.model_type).packed


def tokens_read(model: Any, document: Document, header: int = 0) -> int:
    """How many tokens a pass reads for a document after a header, which a model that cannot pack reads anew."""
    if can_pack(model):
        return len(document)
    longest = header + len(document.prefix) + max(map(len, document.branches), default=0)
    return longest * max(1, len(document.branches))


def encode_header(model: Any, ids: Sequence[int], budget: int) -> Header:
    """Encode the tokens before every document, `budget` per pass, fewer when memory runs out."""
    if not can_pack(model):
        return Header(len(ids), ids=ids)
    header = Header()
    while header.length < len(ids):
        part = Document(ids[header.length : header.length + budget])
        longer = Header(header.length + len(part))
        try:
            packed_states(model, [part], torch.tensor([], dtype=torch.int64), header, longer)
        except (RuntimeError, MemoryError) as error:
            if len(part) == 1 or not out_of_memory(error):
                raise
            budget = halved(len(part))
            continue
        header = longer
    return header


def context_length(model: Any) -> int:
    """Return how many tokens a model can read."""
    return int(model.config.max_position_embeddings)


def halved(tokens: int) -> int:
    """Half as many tokens, with a warning."""
    logging.getLogger(__name__).warning("memory ran out: going on with %d tokens a pass", tokens // 2)
    return tokens // 2


def distinct(positions: Sequence[int]) -> Tensor:
    """The positions at which the head runs, int64: the first tokens of all choices are scored at one position."""
    unique: Tensor = torch.tensor(positions, dtype=torch.int64).unique()
    return unique


def target_logprobs(model: Any, states: Tensor, positions: Sequence[int], targets: Sequence[int]) -> Tensor:
    """Log-probability of `targets[i]` after position `positions[i]` of a packed row, float32 [scored].

    Logits exist for a bounded number of positions at a time. `states` are those at `distinct(positions)`.
    """
    row, target_ids = torch.tensor(positions).unique(return_inverse=True)[1], torch.tensor(targets)
    row, target_ids = row.to(states.device), target_ids.to(states.device)
    result = torch.empty(len(target_ids), device=states.device)
    at_once = _PROBABILITY_ROWS if states.device.type == "cpu" else HEAD_POSITIONS
    for index, logprobs in enumerate(_logprobs(model, states, at_once)):
        in_part = row // at_once == index
        result[in_part] = logprobs[row[in_part] % at_once, target_ids[in_part]]
        del logprobs  # before those of the next positions exist
    return result


def _logprobs(model: Any, states: Tensor, at_once: int) -> Iterator[Tensor]:
    """Log-probabilities of all tokens, [at_once, vocabulary] at a time."""
    for chunk in states.split(HEAD_POSITIONS):
        for logits in head_logits(model, chunk).split(at_once):
            # log_softmax in float32, as in lm-evaluation-harness: both are off by about 8e-6 per token
            yield logits.float().log_softmax(-1)


def packed_states(
    model: Any,
    documents: Sequence[Document],
    positions: Tensor,
    header: Header | None = None,
    into: Header | None = None,
) -> Tensor:
    """The output head's input at positions of a packed row, int64 [scored] → [scored, hidden], in the model's type.

    `model` is a causal LM inside `packed_attention`. `header` precedes each document; `into` is a longer header that
    receives the row's keys and values.
    """
    if not can_pack(model):
        return _unpacked_states(model, documents, positions, header or Header())
    output = model.get_decoder()(**packed_inputs(model, documents, header, into), use_cache=False)
    states: Tensor = output.last_hidden_state[0]
    return states[positions.to(states.device)]


def _unpacked_states(model: Any, documents: Sequence[Document], positions: Tensor, header: Header) -> Tensor:
    """The same of a model that cannot pack: every sequence is a row, padded at its end, where no token before sees."""
    rows: list[list[int]] = []
    places: list[tuple[int, int]] = []  # of every token of the packed row: its sequence, and where it is there
    for document in documents:
        start, first = header.length + len(document.prefix), len(rows)
        rows += [[*header.ids, *document.prefix, *branch] for branch in document.branches or [()]]
        places += [(first, at) for at in range(header.length, start)]
        places += [(first + i, start + at) for i, own in enumerate(document.branches) for at in range(len(own))]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
    states: Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    of, at = torch.tensor(places, device=states.device)[positions.to(states.device)].T
    return states[of, at]


def packed_inputs(
    model: Any, documents: Sequence[Document], header: Header | None = None, into: Header | None = None
) -> dict[str, Any]:
    """Return the arguments of the decoder of a model inside `packed_attention`; see `packed_states`."""
    header = header or Header()
    ids: list[int] = []
    blocks: list[Block] = []
    in_sequence: list[int] = []  # the position of each token in its own sequence
    parts: list[int] = []
    for document in documents:
        length = header.length + len(document.prefix)
        branches = [branch for branch in document.branches if branch]
        blocks.append(Block(len(ids), len(ids) + len(document), causal=len(branches) < 2))
        ids += document.prefix
        in_sequence += range(header.length, length)
        parts += [0] * len(document.prefix)
        for number, branch in enumerate(branches, start=1):
            ids += branch
            in_sequence += range(length, length + len(branch))
            parts += [number] * len(branch)
    multiple = _ROW_MULTIPLE if model.device.type == "cpu" and model.dtype == torch.bfloat16 else 1
    padding = [0] * (-len(ids) % multiple)
    input_ids, positions, numbers = (
        torch.tensor(values + padding, device=model.device) for values in (ids, in_sequence, parts)
    )
    row = Row(blocks, header, positions, numbers, max(in_sequence) + 1, into)
    return {"input_ids": input_ids[None], "position_ids": positions[None], "packed_row": row}
