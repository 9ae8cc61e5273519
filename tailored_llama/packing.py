"""Many sequences in one row: every linear layer sees all tokens at once, attention stays within each document.

A document is a prefix and branches that continue it, such as a context and its choices: the prefix is encoded once.
A header, such as the solved examples of a few-shot benchmark, is encoded once for all documents. There is no padding,
so a forward pass costs its distinct tokens and nothing else. The model is an unchanged transformers model, with or
without a PEFT adapter: an attention function registered with transformers reads the blocks of the row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from tailored_llama.errors import InputError
from tailored_llama.memory import out_of_memory
from tailored_llama.models import head_logits

Result = TypeVar("Result")

_ATTENTION = "tailored_packed"
HEAD_POSITIONS = 256  # of a pass whose logits are in memory at once: at 128,000 entries 131 MB in float32


@dataclass(frozen=True)
class Document:
    """Token ids that all branches share, and the token ids of each branch after them (none, one or several)."""

    prefix: Sequence[int]
    branches: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))

    def offset(self, branch: int, position: int) -> int:
        """Where token `position` of the sequence prefix + branch stands within the packed document."""
        if position < len(self.prefix):
            return position
        return position + sum(map(len, self.branches[:branch]))


@dataclass(frozen=True)
class Header:
    """Tokens before every document of a row: their number, and each layer's keys and values.

    Keys and values: [1, query heads, length, head_dim], by the index of the layer.
    """

    length: int = 0
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Block:
    """One document's place in the row.

    `places`: of its tokens in their own sequences, header included [length]; `mask`: what is added to attention scores
    [1, 1, length, header + length], None for plain causal; `windowed`: the same within a sliding window, by its width.
    """

    start: int
    stop: int
    places: Tensor
    mask: Tensor | None
    windowed: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Row:
    """What the attention function needs to know of a row; the keys and values it sees go `into` a longer header."""

    blocks: Sequence[_Block]
    header: Header
    longest: int  # sequence: header, prefix and one branch
    into: Header | None = None


def token_budget(batch_tokens: int | None, model: Any) -> int:
    """Tokens of a pass: what is asked for, else as many as make full use of the model's device."""
    # On a CPU, larger passes free and fault in anew what every layer allocates, which costs more time a token.
    return batch_tokens or (16_384 if model.device.type == "cuda" else 1_024)


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut a sequence of documents, by index, so that no part has more than `budget` tokens where one alone has not."""
    parts: list[list[int]] = []
    start = 0
    while start < len(lengths):
        stop = _fill(lengths, start, budget, padded=False)
        parts.append(list(range(start, stop)))
        start = stop
    return parts


def _fill(lengths: Sequence[int], start: int, budget: int, padded: bool) -> int:
    """The end of the longest part from `start` that has at most `budget` tokens; one document in any case.

    Padded, every document is as long as the part's first.
    """
    stop, used = start + 1, lengths[start]
    while stop < len(lengths) and (used := used + lengths[start if padded else stop]) <= budget:
        stop += 1
    return stop


def within_memory(
    lengths: Sequence[int], budget: int, run: Callable[[list[int]], Result], padded: bool = False
) -> Iterator[tuple[list[int], Result]]:
    """Run batches of documents, longest first, at most `budget` tokens in each (one document in any case).

    Where memory runs out, CUDA's or the CPU's, the budget is halved for all that remains.

    Args:
        run: what to do with a batch, given as indices of documents.
        padded: whether `run` pads the documents of a batch to the longest, and the padding counts.

    Yields:
        The batch and what `run` made of it.

    Raises:
        RuntimeError, MemoryError: memory runs out with a single document.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    ordered = [lengths[i] for i in order]
    start = 0
    while start < len(order):
        stop = _fill(ordered, start, budget, padded)
        batch = order[start:stop]
        try:
            result = run(batch)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not out_of_memory(error):
                raise
            budget = halved(ordered[start] * len(batch) if padded else sum(ordered[start:stop]))
            continue
        yield batch, result
        start = stop


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Let a transformers model (or the base of a PEFT model) read packed rows inside the `with` block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def encode_header(model: Any, ids: Sequence[int], budget: int, before: Header | None = None) -> Header:
    """Encode tokens that stand before every document, `budget` of them in one pass, fewer where memory runs out.

    Args:
        model: a causal LM inside `packed_attention`.
        ids: token ids.
        budget: tokens of a pass.
        before: what stands before them in turn, such as a soft prompt.
    """
    header = before = before or Header()
    while (done := header.length - before.length) < len(ids):
        part = Document(ids[done : done + budget])
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


def embedded_header(model: Any, embeddings: Tensor) -> Header:
    """A header from embeddings in place of tokens, [1, length, hidden]; gradients reach them."""
    length = embeddings.shape[1]
    header = Header(length)
    places = torch.arange(length, device=embeddings.device)
    model.get_decoder()(
        inputs_embeds=embeddings.to(model.dtype),  # PEFT keeps them in float32
        position_ids=places[None],
        use_cache=False,
        packed_row=_Row([_Block(0, length, places, None)], Header(), length, header),
    )
    return header


def halved(tokens: int) -> int:
    """Half a number of tokens, and a warning that says so."""
    logging.getLogger(__name__).warning("memory ran out: going on with %d tokens a pass", tokens // 2)
    return tokens // 2


def packed_logprobs(
    model: Any,
    documents: Sequence[Document],
    positions: Sequence[int],
    targets: Sequence[int],
    header: Header | None = None,
) -> Tensor:
    """Log-probability of `targets[i]` after position `positions[i]` of a packed row, float32 [scored].

    Logits exist for a bounded number of positions at a time, never for batch × length.

    Args:
        model: a causal LM inside `packed_attention`.
        documents: what to pack, in order.
        header: what stands before each of them.
    """
    # The first tokens of all choices are read off one position: the head runs there once.
    distinct, row = torch.tensor(positions).unique(return_inverse=True)
    states = packed_states(model, documents, distinct, header)
    row, wanted = row.to(states.device), torch.tensor(targets, device=states.device)
    result = torch.empty(len(wanted), device=states.device)
    for start, some in enumerate(states.split(HEAD_POSITIONS)):
        part = row // HEAD_POSITIONS == start
        at = row[part] % HEAD_POSITIONS
        # log_softmax as lm-evaluation-harness takes it: in float32 it is off by about 8e-6 a token, and so are both
        result[part] = head_logits(model, some).float().log_softmax(-1)[at, wanted[part]]
    return result


def packed_states(
    model: Any,
    documents: Sequence[Document],
    positions: Tensor,
    header: Header | None = None,
    into: Header | None = None,
) -> Tensor:
    """What the output head reads, at some positions of a packed row.

    Args:
        model: a causal LM inside `packed_attention`.
        documents: what to pack, in order.
        positions: indices into the row, int64 [scored].
        header: what stands before each document.
        into: a longer header, to be given its keys and values.

    Returns:
        [scored, hidden], in the model's type.
    """
    header = header or Header()
    device = model.device
    ids: list[int] = []
    starts: list[int] = []
    at: list[int] = []
    for document in documents:
        starts.append(len(ids))
        length = header.length + len(document.prefix)
        ids += document.prefix
        at += range(header.length, length)
        for branch in document.branches:
            ids += branch
            at += range(length, length + len(branch))
    places = torch.tensor(at, device=device)
    blocks = [
        _Block(
            start, start + len(document), places[start : start + len(document)], _mask(document, header.length, model)
        )
        for start, document in zip(starts, documents, strict=True)
    ]
    output = model.get_decoder()(
        input_ids=torch.tensor([ids], device=device),
        position_ids=places[None],
        use_cache=False,
        packed_row=_Row(blocks, header, max(at) + 1, into),
    )
    states: Tensor = output.last_hidden_state[0, positions.to(device)]
    return states


def _mask(document: Document, header: int, model: Any) -> Tensor | None:
    """What is added to attention scores: 0 where a token attends to another, to the header and to all before it, and
    −∞ where it does not, on other branches and to all after it."""
    lengths = [len(document.prefix), *filter(None, map(len, document.branches))]
    if header == 0 and len(lengths) < 3:  # one branch or none: plain causal attention, which is faster
        return None
    part = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = torch.ones(len(part), header + len(part), dtype=torch.bool).tril(header)
    seen[:, header:] &= (part[:, None] == part[None]) | (part[None] == 0)
    return torch.zeros(seen.shape, dtype=model.dtype).masked_fill_(~seen, -torch.inf)[None, None].to(model.device)


def _causal(length: int, like: Tensor) -> Tensor:
    """The mask of plain causal attention, where one has to be written out."""
    return torch.full((1, 1, length, length), -torch.inf, dtype=like.dtype, device=like.device).triu(1)


def _within_window(block: _Block, header: int, window: int, like: Tensor) -> Tensor:
    """A block's mask where a token sees those less than `window` before it; made in the first layer that asks."""
    if window not in block.windowed:
        seen = torch.cat([torch.arange(header, device=block.places.device), block.places])
        mask = _causal(len(seen), like) if block.mask is None else block.mask
        block.windowed[window] = mask.masked_fill(block.places[:, None] - seen[None] >= window, -torch.inf)
    return block.windowed[window]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float, softcap: float | None
) -> Tensor:
    """SDPA; or, as that has no soft-capping (arXiv 2408.00118), the same in single steps where scores are capped."""
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=mask is None, scale=scale)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    scores = scores + (_causal(scores.shape[2], scores) if mask is None else mask)
    return torch.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, dropout > 0) @ value


def _packed_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_row: _Row,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One document at a time: [1, heads, row, head_dim] → [1, row, heads, head_dim]."""
    if odd := sorted(name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None):
        raise InputError(f"model: its attention has {odd[0]}; allowed: softmax attention, soft-capped or not")
    header, layer = packed_row.header, module.layer_idx
    groups = query.shape[1] // key.shape[1]
    key, value = (repeat_kv(states, groups) for states in (key, value))
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    for block in packed_row.blocks:
        rows = slice(block.start, block.stop)
        keys, values, mask = key[:, :, rows], value[:, :, rows], block.mask
        if header.length:
            keys = torch.cat([header.keys[layer].to(keys.dtype), keys], dim=2)
            values = torch.cat([header.values[layer].to(values.dtype), values], dim=2)
        if sliding_window is not None and packed_row.longest > sliding_window:
            mask = _within_window(block, header.length, sliding_window, query)
        attended = _attend(query[:, :, rows], keys, values, mask, dropout, scale, softcap)
        output[:, rows] = attended.transpose(1, 2)
    if packed_row.into is not None:  # a header's own pass: one block
        packed_row.into.keys[layer], packed_row.into.values[layer] = keys, values
    return output, None


AttentionInterface.register(_ATTENTION, _packed_attention_forward)
