"""The log-likelihood of every choice of encoded prompts, in packed rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tailored_llama.data.encoding import Encoded, shared_header
from tailored_llama.models import PackedRow, packed_attention, run_packed, target_logprobs
from tailored_llama.progress import Progress, silent


def loglikelihoods(
    model: Any, encoded: Sequence[Encoded], batch_tokens: int, progress: Progress = silent
) -> list[list[float]]:
    """Summed log-probability of every choice of every prompt, in the given order.

    The common start of all prompts is encoded once. Prompts are packed by length, at most `batch_tokens` tokens per
    forward pass. When memory runs out, that budget is halved for the remaining prompts.
    """

    def logprobs_of(row: PackedRow, states: Tensor) -> list[float]:
        return list(target_logprobs(model, states, row.positions, row.targets).tolist())

    results: list[list[float]] = [[] for _ in encoded]
    whole = [i for i, item in enumerate(encoded) if not item.truncated]
    cut = [i for i, item in enumerate(encoded) if item.truncated]  # they start at different points: no common header
    done = 0
    with torch.inference_mode(), packed_attention(model):
        for members in filter(None, (whole, cut)):
            shared = shared_header([encoded[i] for i in members])
            group = [encoded[i].after(len(shared)) for i in members]
            lengths = [len(item.document) for item in group]
            for batch, logprobs in run_packed(model, lengths, batch_tokens, partial(_row, group), logprobs_of, shared):
                values = iter(logprobs)
                for i in batch:
                    results[members[i]] = [math.fsum(islice(values, len(wanted))) for wanted in group[i].targets]
                done += len(batch)
                progress(done, len(encoded))
    return results


def _row(encoded: Sequence[Encoded], batch: Sequence[int]) -> PackedRow:
    """Pack prompts, with the positions and targets of all their choices."""
    positions: list[int] = []
    targets: list[int] = []
    start = 0
    for item in (items := [encoded[i] for i in batch]):
        for at, wanted in zip(item.positions, item.targets, strict=True):
            positions += [start + p for p in at]
            targets += wanted
        start += len(item.document)
    return PackedRow([item.document for item in items], positions, targets)
