"""A dense model's outputs along a text, for a student whose vocabulary was trimmed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tailored_llama.errors import InputError
from tailored_llama.models import IdTable
from tailored_llama.training.distillation import ABSENT, SoftTargets


def in_pieces(targets: SoftTargets, table: IdTable, ids: Sequence[int] | None = None) -> SoftTargets:
    """The same distributions along the same text, in the student's tokens.

    The teacher says something only where one of its own tokens ends. The student's other positions, inside a word that
    it writes in pieces, have no targets. Of the teacher's likeliest next tokens, one that the student lacks stands for
    the first of its pieces; what falls on one token is summed. All others remain the rest, which counts as one.

    Known deviation: BPE may write a word's neighbours together with one of its pieces. By default the text is written
    token by token, which is not always the student's own writing.

    Args:
        targets: along the dense model's tokens.
        table: from these to the student's tokens.
        ids: the student's own tokens of the text, which may go on after the teacher's; by default the pieces of the
            dense model's tokens.

    Raises:
        InputError: the teacher read tokens that are not in the table, or another text than `ids`.
    """
    read = torch.cat([torch.tensor(targets.input_ids), targets.tokens.reshape(-1)])
    known = table.first[read.clamp(max=len(table.first) - 1)] >= 0
    if (unknown := read[(read >= len(table.first)) | ~known]).numel():
        raise InputError(
            f"teacher: got token {int(unknown[0])}; allowed: outputs of the model that the vocabulary was trimmed from"
        )
    pieces = [table.pieces[token] for token in targets.input_ids]
    written = list(itertools.chain.from_iterable(pieces))
    ids = written if ids is None else ids
    write = partial(map, table.texts.__getitem__)
    if not (own := "".join(write(ids))).startswith(text := "".join(write(written))) and not text.startswith(own):
        raise InputError("teacher: got outputs along another text; allowed: those of `teach` for the same prompts")
    ends = dict(zip(itertools.accumulate(map(len, write(ids))), range(len(ids)), strict=True))
    theirs = itertools.accumulate(sum(map(len, write(part))) for part in pieces)
    rows = [(row, ends[end]) for row, end in enumerate(theirs) if end in ends]
    tokens = torch.full((len(ids), targets.tokens.shape[1]), -1)
    logprobs = torch.full(tokens.shape, ABSENT)
    if rows:
        source, target = torch.tensor(rows).T
        tokens[target], logprobs[target] = _merged(table.first[targets.tokens[source]], targets.logprobs[source])
    return SoftTargets(tuple(ids), tokens, logprobs)


def _merged(tokens: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Each token once in a row, with the sum of its probabilities: [positions, top] both; −1 and `ABSENT` fill up."""
    tokens, order = tokens.sort(dim=-1, stable=True)
    logprobs = logprobs.gather(-1, order)
    for column in range(1, tokens.shape[1]):
        same = tokens[:, column] == tokens[:, column - 1]
        both = torch.logaddexp(logprobs[:, column], logprobs[:, column - 1])
        logprobs[:, column] = torch.where(same, both, logprobs[:, column])
        logprobs[same, column - 1] = ABSENT
        tokens[same, column - 1] = -1
    return tokens, logprobs
