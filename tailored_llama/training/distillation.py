"""Distillation: the dense model's next-token distributions along a text, for a pruned model to learn from."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tailored_llama import models
from tailored_llama.config import Work
from tailored_llama.data import read_calibration
from tailored_llama.errors import InputError
from tailored_llama.store import open_table, read_row_group, table_parts
from tailored_llama.training.settings import TeachSettings

TEACHER_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "tokens": pa.list_(pa.int32()),  # the likeliest next tokens of every position: length × top
        "logprobs": pa.list_(pa.float32()),  # their log-probabilities
    }
)

ABSENT = -100.0  # log-probability of what is no target: e⁻¹⁰⁰ counts as nothing in float32
_AT_ONCE = 2**18  # tokens whose outputs are in memory while they are written: 64 MB at 32 a token
_ROW_GROUP = 2**13  # tokens in a row group, the least that is read at once: 2 MB of outputs


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's next-token distributions along a sequence, each cut to its likeliest tokens; −1 is no target."""

    input_ids: tuple[int, ...]
    tokens: Tensor  # int64 [length, top]
    logprobs: Tensor  # float32 [length, top]; `ABSENT` of no target


def teach(dense: Path, text: Path, *, settings: TeachSettings, work: Work) -> dict[str, Any]:
    """Stage: write the dense model's next-token distributions along every sequence of a text as `teacher.parquet`.

    The `top` likeliest tokens of each distribution are kept.

    Raises:
        InputError: `top` is not below the vocabulary size.
    """
    model, sequences = models.open_model(dense, work.execution, work.out), read_calibration(text)
    if settings.top >= (size := model.config.vocab_size):
        raise InputError(f"healing.top: got {settings.top}; allowed: less than {size}, the vocabulary size")
    (count, length), budget, done = sequences.shape, models.token_budget(work.execution.batch_tokens, model), 0
    file, finish = work.out / "teacher.parquet", partial(_likeliest, model, settings)
    with torch.inference_mode(), models.packed_attention(model), table_parts(file, TEACHER_SCHEMA) as write:
        for part in sequences.split(max(1, _AT_ONCE // length)):
            tokens, logprobs = (np.empty((len(part), length * settings.top), kind) for kind in (np.int32, np.float32))
            items = [models.Encoded(models.Document(ids), [range(length)]) for ids in part.tolist()]
            for batch, outputs in models.run_packed(model, items, budget, finish):
                tokens[batch], logprobs[batch] = (output.reshape(len(batch), -1) for output in outputs)
                work.progress(done := done + len(batch), count)
            starts = pa.array(np.arange(len(part) + 1) * length * settings.top, pa.int32())
            columns = {
                "input_ids": part.tolist(),
                "tokens": pa.ListArray.from_arrays(starts, tokens.reshape(-1)),  # no copy
                "logprobs": pa.ListArray.from_arrays(starts, logprobs.reshape(-1)),
            }
            write(columns, max(1, _ROW_GROUP // length))
    return {"tokens": count * length}


def _likeliest(
    model: Any, settings: TeachSettings, row: models.PackedRow, states: Tensor
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The likeliest tokens at every position of a row, and their log-probabilities: [positions, top] each."""
    parts = [
        models.head_logits(model, part).float().log_softmax(-1).topk(settings.top)
        for part in torch.split(states, models.HEAD_POSITIONS)
    ]
    logprobs, tokens = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return tokens.cpu().numpy(), logprobs.cpu().numpy()


class Teacher(Sequence[SoftTargets]):
    """The teacher outputs that `teach` wrote, in the order of its text; a sequence is read from disk on access.

    Raises:
        InputError: `teacher.parquet` is missing, unreadable, or has another schema.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "teacher.parquet"
        file = open_table(path, TEACHER_SCHEMA)
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        self._starts: list[int] = list(itertools.accumulate((group.num_rows for group in groups), initial=0))
        self._read = lru_cache(1)(partial(read_row_group, file, path=path))  # keeps the last row group

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        position = range(len(self))[index]
        group = bisect_right(self._starts, position) - 1
        row = self._read(group).slice(position - self._starts[group], 1)
        ids, tokens, logprobs = (row[name].combine_chunks().flatten() for name in ("input_ids", "tokens", "logprobs"))
        likeliest = torch.from_numpy(tokens.to_numpy().astype(np.int64)).reshape(len(ids), -1)
        values = torch.from_numpy(logprobs.to_numpy().copy()).view_as(likeliest)
        return SoftTargets(tuple(ids.to_pylist()), likeliest, values)


def in_pieces(targets: SoftTargets, table: models.IdTable) -> SoftTargets:
    """The same distributions along the same text, in the tokens of a student whose vocabulary was trimmed.

    Targets stand only where one of the teacher's own tokens ends, not inside a word that the student writes in pieces.
    Of the teacher's likeliest next tokens, one that the student lacks stands for the first of its pieces; what falls on
    one token is summed. All others remain the rest, which counts as one.

    Known deviation: the text is written token by token. BPE may write a word's neighbours together with its pieces.

    Raises:
        InputError: the teacher read tokens that are not in the table.
    """
    if unknown := {*targets.input_ids, *targets.tokens.flatten().tolist()} - table.pieces.keys():
        raise InputError(
            f"teacher: got token {min(unknown)}; allowed: outputs of the model that the vocabulary was trimmed from"
        )
    pieces = [table.pieces[token] for token in targets.input_ids]
    ids, ends = tuple(itertools.chain.from_iterable(pieces)), torch.tensor([*map(len, pieces)]).cumsum(0) - 1
    firsts, order = table.first[targets.tokens].sort(dim=-1)
    column = (firsts.diff(dim=-1, prepend=firsts[:, :1]) > 0).cumsum(-1)  # one for all that have the same first piece
    shares = targets.logprobs.gather(-1, order).exp()
    sums = torch.zeros_like(shares).scatter_add_(-1, column, shares)
    tokens, logprobs = (torch.full((len(ids), firsts.shape[1]), value) for value in (-1, ABSENT))
    tokens[ends] = torch.full_like(firsts, -1).scatter_(-1, column, firsts)
    logprobs[ends] = sums.log().clamp(min=ABSENT)
    return SoftTargets(ids, tokens, logprobs)


def divergence(model: Any, states: Tensor, targets: SoftTargets) -> Tensor:
    """Mean Kullback-Leibler divergence of a student from its teacher over a sequence, in nats.

    The states, [length, hidden], are the inputs of the student's head. All tokens that were not kept count as one, so
    this is a lower bound on the divergence of the whole distributions. A position without targets adds nothing. Logits
    are recomputed in the backward pass, so they are held for at most a few hundred positions.
    """
    total = states.new_zeros((), dtype=torch.float32)
    parts = (torch.split(rows, models.HEAD_POSITIONS) for rows in (states, targets.tokens, targets.logprobs))
    for part, tokens, logprobs in zip(*parts, strict=True):
        inputs = (part, tokens.to(states.device), logprobs.to(states.device))
        total = total + checkpoint(partial(_divergence, model), *inputs, use_reentrant=False)
    return total / len(states)


def _divergence(model: Any, states: Tensor, tokens: Tensor, logprobs: Tensor) -> Tensor:
    """Divergence summed over positions: states [positions, hidden]; tokens, logprobs [positions, top]."""
    logits, absent = models.head_logits(model, states).float(), tokens < 0
    student = logits.gather(-1, tokens.clamp(min=0)) - logits.logsumexp(-1, keepdim=True)
    student = student.masked_fill(absent, ABSENT)
    student_rest, teacher_rest = _rest(student), _rest(logprobs)
    return (logprobs.exp() * (logprobs - student)).sum() + (teacher_rest.exp() * (teacher_rest - student_rest)).sum()


def _rest(logprobs: Tensor) -> Tensor:
    """Log-probability of all tokens that were not kept; the resolution of float32 bounds it from below."""
    return (-logprobs.exp().sum(-1)).clamp(min=-1 + 1e-7).log1p()
