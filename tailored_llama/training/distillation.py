"""Distillation: the dense model's next-token distributions along a text, for a pruned model to learn from."""

from __future__ import annotations

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

from tailored_llama.config import Work
from tailored_llama.data import encode_answer, read_calibration, read_prompts
from tailored_llama.errors import InputError
from tailored_llama.models import (
    HEAD_POSITIONS,
    Document,
    Encoded,
    PackedRow,
    batches,
    head_logits,
    load_tokenizer,
    open_model,
    packed_attention,
    run_packed,
    token_budget,
)
from tailored_llama.progress import Progress
from tailored_llama.store import open_table, read_row_group, table_parts
from tailored_llama.training.settings import TeachSettings

TEACHER_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "tokens": pa.list_(pa.int32()),  # the likeliest next tokens of every position: length × top
        "logprobs": pa.list_(pa.float32()),  # their log-probabilities at the temperature
    }
)

ABSENT = -100.0  # log-probability of what is no target: e⁻¹⁰⁰ counts as nothing in float32
_AT_ONCE = 2**18  # tokens whose outputs are in memory while they are written: 64 MB at 32 a token
_ROW_GROUP = 2**13  # tokens in a row group, the least that is read at once: 2 MB of outputs


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's next-token distributions along a sequence, each cut to its likeliest tokens.

    A token of −1 with the log-probability `ABSENT` is no target.
    """

    input_ids: tuple[int, ...]
    tokens: Tensor  # int64 [length, top]
    logprobs: Tensor  # float32 [length, top]


def teach(dense: Path, source: Path, *, settings: TeachSettings, work: Work) -> dict[str, Any]:
    """Stage: write the dense model's next-token distributions along every sequence of a source as `teacher.parquet`.

    The `top` likeliest tokens of each distribution are kept, at the temperature (arXiv 1503.02531). Memory holds the
    outputs of at most 2¹⁸ tokens at a time.

    Args:
        dense: the teacher.
        source: a folder with `calibration.parquet`, or with `prompts.parquet`: its shots with their right answers.

    Raises:
        InputError: `top` is not below the vocabulary size, or the source has neither file.
    """
    model, tokenizer = open_model(dense, work.execution, work.out), load_tokenizer(dense)
    if settings.top >= (size := model.config.vocab_size):
        raise InputError(f"distillation.top: got {settings.top}; allowed: less than {size}, the vocabulary size")
    if (source / "calibration.parquet").is_file():
        sequences = list(read_calibration(source))
    else:
        limit = model.config.max_position_embeddings - settings.reserved
        shots = read_prompts(source, "shots")
        sequences = [torch.tensor(encode_answer(tokenizer, prompt, limit).document.prefix) for prompt in shots]
    lengths, budget = [len(ids) for ids in sequences], token_budget(work.execution.batch_tokens, model)
    rows, file = max(1, _ROW_GROUP // max(lengths, default=1)), work.out / "teacher.parquet"
    with torch.inference_mode(), packed_attention(model), table_parts(file, TEACHER_SCHEMA) as write:
        for part in batches(lengths, _AT_ONCE):
            write(_outputs(model, sequences, part, settings, budget, work.progress), rows)
    return {"tokens": sum(lengths)}


def _outputs(
    model: Any,
    sequences: Sequence[Tensor],
    part: Sequence[int],
    settings: TeachSettings,
    budget: int,
    progress: Progress,
) -> dict[str, Any]:
    """The columns of consecutive sequences."""
    own = [sequences[i].tolist() for i in part]
    lengths, done = [len(ids) for ids in own], part[0]
    starts = np.cumsum([0, *lengths])
    tokens = np.empty((starts[-1], settings.top), np.int32)
    logprobs = np.empty(tokens.shape, np.float32)
    items = [Encoded(Document(ids), [range(len(ids))]) for ids in own]
    for batch, (likeliest, values) in run_packed(model, items, budget, partial(_likeliest, model, settings)):
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch])
        tokens[rows], logprobs[rows] = likeliest, values
        progress(done := done + len(batch), len(sequences))
    offsets = pa.array(starts * settings.top, pa.int32())
    return {
        "input_ids": own,
        "tokens": pa.ListArray.from_arrays(offsets, tokens.reshape(-1)),
        "logprobs": pa.ListArray.from_arrays(offsets, logprobs.reshape(-1)),
    }


def _likeliest(
    model: Any, settings: TeachSettings, row: PackedRow, states: Tensor
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Top tokens at every position of a row, and their log-probabilities: [positions, top] each."""
    parts = [
        _logits(model, part, settings.temperature).log_softmax(-1).topk(settings.top)
        for part in torch.split(states, HEAD_POSITIONS)
    ]
    logprobs, tokens = (torch.cat(own) for own in zip(*parts, strict=True))
    return tokens.cpu().numpy(), logprobs.cpu().numpy()


def _logits(model: Any, states: Tensor, temperature: float) -> Tensor:
    logits = head_logits(model, states).float()
    return logits if temperature == 1 else logits / temperature  # avoids a copy as wide as the vocabulary


class Teacher(Sequence[SoftTargets]):
    """What `teach` wrote, in the order of its source. Each sequence is read from disk when it is asked for.

    Raises:
        InputError: `teacher.parquet` is missing, unreadable, or has another schema.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "teacher.parquet"
        self._file = open_table(self._path, TEACHER_SCHEMA)
        groups = map(self._file.metadata.row_group, range(self._file.num_row_groups))
        self._starts: list[int] = list(itertools.accumulate((group.num_rows for group in groups), initial=0))
        self._read = lru_cache(1)(partial(read_row_group, self._file, path=self._path))  # keeps the last row group

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        position = range(len(self))[index]
        group = bisect_right(self._starts, position) - 1
        row = self._read(group).slice(position - self._starts[group], 1)
        ids, tokens, logprobs = (row[name].combine_chunks().flatten() for name in TEACHER_SCHEMA.names)
        likeliest = torch.from_numpy(tokens.to_numpy().astype(np.int64)).reshape(len(ids), -1)
        return SoftTargets(
            tuple(ids.to_pylist()), likeliest, torch.from_numpy(logprobs.to_numpy().copy()).view_as(likeliest)
        )


def divergence(model: Any, states: Tensor, targets: SoftTargets, temperature: float) -> Tensor:
    """Mean Kullback-Leibler divergence of a student from its teacher over a sequence, in nats, times temperature².

    All tokens that were not kept count as one, so this is a lower bound on the divergence of the whole distributions.
    A position without targets adds nothing.
    Logits are recomputed in the backward pass, so they are held for at most a few hundred positions.

    Args:
        states: inputs of the student's head along the sequence, [length, hidden].
        temperature: of the teacher's distributions.
    """
    total = states.new_zeros((), dtype=torch.float32)
    parts = (torch.split(rows, HEAD_POSITIONS) for rows in (states, targets.tokens, targets.logprobs))
    for part, tokens, logprobs in zip(*parts, strict=True):
        inputs = (part, tokens.to(states.device), logprobs.to(states.device))
        total = total + checkpoint(partial(_divergence, model, temperature), *inputs, use_reentrant=False)
    return total * temperature**2 / len(states)


def _divergence(model: Any, temperature: float, states: Tensor, tokens: Tensor, logprobs: Tensor) -> Tensor:
    """Divergence summed over positions: states [positions, hidden]; tokens, logprobs [positions, top]."""
    logits, absent = _logits(model, states, temperature), tokens < 0
    student = logits.gather(-1, tokens.clamp(min=0)) - logits.logsumexp(-1, keepdim=True)
    student = student.masked_fill(absent, ABSENT)
    student_rest, teacher_rest = _rest(student), _rest(logprobs)
    return (logprobs.exp() * (logprobs - student)).sum() + (teacher_rest.exp() * (teacher_rest - student_rest)).sum()


def _rest(logprobs: Tensor) -> Tensor:
    """Log-probability of all tokens that were not kept; the resolution of float32 bounds it from below."""
    return (-logprobs.exp().sum(-1)).clamp(min=-1 + 1e-7).log1p()
