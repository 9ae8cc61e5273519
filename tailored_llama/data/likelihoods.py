"""The log-likelihood of every choice of encoded prompts, in packed rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tailored_llama.data.encoding import shared_header
from tailored_llama.models import Encoded, PackedRow, packed_attention, run_packed, target_logprobs
from tailored_llama.progress import Progress, silent

Score = tuple[float, bool]  # the log-likelihood of a choice or a token, and whether it is the greedy one


def loglikelihoods(
    model: Any, encoded: Sequence[Encoded], batch_tokens: int, progress: Progress = silent
) -> list[list[float]]:
    """Summed log-probability of every choice of every prompt, in the given order; see `choice_scores`."""
    results: list[list[float]] = [[] for _ in encoded]
    with torch.inference_mode(), packed_attention(model):
        for done, (index, scores) in enumerate(choice_scores(model, encoded, batch_tokens), start=1):
            results[index] = [value for value, _ in scores]
            progress(done, len(encoded))
    return results


def choice_scores(model: Any, encoded: Sequence[Encoded], batch_tokens: int) -> Iterator[tuple[int, list[Score]]]:
    """The index of every prompt, and the scores of its choices, pass by pass.

    The common start of all prompts is encoded once. Prompts are packed by length, at most `batch_tokens` tokens per
    forward pass. When memory runs out, that budget is halved for the remaining prompts. `model` is inside
    `packed_attention`.
    """

    def finish(row: PackedRow, states: Tensor) -> list[Score]:
        likeliest = torch.empty(len(row.targets), dtype=torch.bool, device=states.device)
        logprobs = target_logprobs(model, states, row.positions, row.targets, likeliest)
        return list(zip(logprobs.tolist(), likeliest.tolist(), strict=True))

    whole = [i for i, item in enumerate(encoded) if not item.truncated]
    cut = [i for i, item in enumerate(encoded) if item.truncated]  # they start at different points: no common header
    for members in filter(None, (whole, cut)):
        shared = shared_header([encoded[i] for i in members])
        group = [encoded[i].after(len(shared)) for i in members]
        for batch, found in run_packed(model, group, batch_tokens, finish, shared):
            values = iter(found)  # one for each target
            for i in batch:
                choices = [list(islice(values, len(wanted))) for wanted in group[i].targets]
                yield members[i], [(math.fsum(v for v, _ in own), all(likely for _, likely in own)) for own in choices]
