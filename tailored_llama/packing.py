"""Many sequences in one row: every linear layer sees all tokens at once, attention stays within each document.

A document is a prefix and branches that continue it, such as a context and its choices: the prefix is encoded once.
There is no padding, so a forward pass costs its distinct tokens and nothing else. The model is an unchanged
transformers model: an attention function registered with transformers reads the blocks of the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_ATTENTION = "tailored_packed"


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
class Block:
    """One document's place in the row; `mask` is bool [1, 1, length, length], or None for plain causal attention."""

    start: int
    stop: int
    mask: Tensor | None


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut a sequence of documents, by index, so that no part has more than `budget` tokens where one alone has not."""
    parts: list[list[int]] = []
    used = 0
    for index, length in enumerate(lengths):
        if not parts or used + length > budget:
            parts.append([])
            used = 0
        parts[-1].append(index)
        used += length
    return parts


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Let a transformers model (or the base of a PEFT model) read packed rows inside the `with` block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def packed_logits(model: Any, documents: Sequence[Document], positions: Tensor) -> Tensor:
    """Logits at some positions of a packed row; the head is applied there only.

    Args:
        model: a causal LM inside `packed_attention`.
        documents: what to pack, in order.
        positions: indices into the row, int64 [scored].

    Returns:
        float [scored, vocabulary], in the model's type.
    """
    device = model.device
    ids: list[int] = []
    places: list[int] = []
    blocks: list[Block] = []
    for document in documents:
        start, length = len(ids), len(document.prefix)
        ids += document.prefix
        places += range(length)
        for branch in document.branches:
            ids += branch
            places += range(length, length + len(branch))
        blocks.append(Block(start, len(ids), _mask(document, device)))
    output = model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([places], device=device),
        use_cache=False,
        logits_to_keep=positions.to(device),
        packed_blocks=blocks,
    )
    logits: Tensor = output.logits[0]
    return logits


def _mask(document: Document, device: Any) -> Tensor | None:
    """Which tokens of a document attend to which: all before them, other branches left out."""
    if len(document.branches) == 0:
        return None
    lengths = [len(document.prefix), *map(len, document.branches)]
    part = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    causal = torch.ones(len(part), len(part), dtype=torch.bool, device=device).tril()
    return (causal & ((part[:, None] == part[None]) | (part[None] == 0)))[None, None]


def _packed_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_blocks: Sequence[Block] = (),
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, one document at a time: [1, heads, row, head_dim] → [1, row, heads, head_dim]."""
    outputs = []
    for block in packed_blocks:
        rows = slice(block.start, block.stop)
        parts = (query[:, :, rows], key[:, :, rows], value[:, :, rows])
        outputs.append(sdpa_attention_forward(module, *parts, block.mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(_ATTENTION, _packed_attention_forward)
