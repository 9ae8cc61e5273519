"""Distillation: the dense model's next-token distributions along a text, for a pruned model to learn from."""

import itertools
from dataclasses import dataclass
from functools import partial
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
from tailored_llama.store import write_table
from tailored_llama.training.settings import TeachSettings

TEACHER_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "tokens": pa.list_(pa.int32()),  # the likeliest next tokens of every position: length × top
        "logprobs": pa.list_(pa.float32()),  # their log-probabilities
    }
)

TEACHER = "teacher.parquet"
ABSENT = -100.0  # log-probability of what is no target: e⁻¹⁰⁰ counts as nothing in float32


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
    finish = partial(_likeliest, model, settings)
    tokens, logprobs = (np.empty((count, length * settings.top), kind) for kind in (np.int32, np.float32))
    items = [models.Encoded(models.Document(ids), [range(length)]) for ids in sequences.tolist()]
    with torch.inference_mode(), models.packed_attention(model):
        for batch, outputs in models.run_packed(model, items, budget, finish):
            tokens[batch], logprobs[batch] = (output.reshape(len(batch), -1) for output in outputs)
            work.progress(done := done + len(batch), count)
    columns = {"input_ids": sequences.tolist(), "tokens": list(tokens), "logprobs": list(logprobs)}
    write_table(work.out / TEACHER, columns, TEACHER_SCHEMA)
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


def targets_of(teacher: pa.Table, number: int) -> SoftTargets:
    """The teacher's outputs along one of the sequences of its table."""
    ids, *outputs = (teacher[name][number].values.to_numpy() for name in TEACHER_SCHEMA.names)
    tokens, logprobs = (torch.tensor(values).reshape(len(ids), -1) for values in outputs)
    return SoftTargets(tuple(ids.tolist()), tokens.long(), logprobs)


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
