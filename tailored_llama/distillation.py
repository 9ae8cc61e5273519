"""Distillation: what the dense model says next at every position of a text, kept for a pruned one to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tailored_llama.artifacts import read_table, write_table
from tailored_llama.calibration import read_calibration
from tailored_llama.config import DistillationConfig, ExecutionConfig
from tailored_llama.errors import InputError
from tailored_llama.models import head_logits, load, load_tokenizer
from tailored_llama.packing import (
    HEAD_POSITIONS,
    Document,
    packed_attention,
    packed_states,
    token_budget,
    within_memory,
)
from tailored_llama.progress import Progress, silent
from tailored_llama.prompts import read_prompts
from tailored_llama.scoring import encode_answer

TEACHER_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "tokens": pa.list_(pa.int32()),  # position by position the likeliest next tokens: length × top
        "logprobs": pa.list_(pa.float32()),  # theirs, at the temperature
    }
)

_LARGEST = 2**31 - 1  # entries of a Parquet column of lists


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's next-token distributions along a sequence, each cut to its likeliest tokens."""

    input_ids: tuple[int, ...]
    tokens: Tensor  # int64 [length, top]
    logprobs: Tensor  # float32 [length, top]


def teach(
    dense: Path,
    source: Path,
    distillation: DistillationConfig,
    out: Path,
    execution: ExecutionConfig,
    progress: Progress = silent,
    reserved: int = 0,
) -> dict[str, Any]:
    """Stage: the dense model's next-token distributions along every sequence of a source, as `teacher.parquet`.

    Of each distribution the `top` likeliest tokens are kept, at the temperature (arXiv 1503.02531).

    Args:
        dense: the teacher.
        source: a folder with `calibration.parquet`, or with `prompts.parquet`: its shots with their right answers.
        distillation: temperature and top.
        out: an existing folder.
        execution: device and tokens in a pass.
        progress: told of every sequence.
        reserved: tokens of the model's context that a soft prompt will take before the shots.

    Raises:
        InputError: `top` is the vocabulary or more, or too much for so long a text; or the source holds neither.
    """
    model, tokenizer = load(dense, device=execution.device), load_tokenizer(dense)
    if distillation.top >= (size := model.config.vocab_size):
        raise InputError(f"distillation.top: got {distillation.top}; allowed: less than {size}, the vocabulary")
    if (source / "calibration.parquet").is_file():
        sequences: list[list[int]] = read_calibration(source).tolist()
    else:
        limit = model.config.max_position_embeddings - reserved
        shots = read_prompts(source, "shots")
        sequences = [list(encode_answer(tokenizer, prompt, limit).document.prefix) for prompt in shots]
    lengths = [len(ids) for ids in sequences]
    if (most := _LARGEST // max(1, sum(lengths))) < distillation.top:
        raise InputError(
            f"distillation.top: got {distillation.top}; allowed: at most {most} for {sum(lengths):,} tokens"
        )
    tokens = np.empty((sum(lengths), distillation.top), np.int32)
    logprobs = np.empty((sum(lengths), distillation.top), np.float32)
    starts, done = np.cumsum([0, *lengths]), 0
    with torch.inference_mode(), packed_attention(model):
        run = partial(_likeliest, model, sequences, distillation)
        for batch, (found, values) in within_memory(lengths, token_budget(execution.batch_tokens, model), run):
            rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch])
            tokens[rows], logprobs[rows] = found, values
            done += len(batch)
            progress(done, len(sequences))
    offsets = pa.array(starts * distillation.top, pa.int32())
    columns = {
        "input_ids": sequences,
        "tokens": pa.ListArray.from_arrays(offsets, tokens.reshape(-1)),
        "logprobs": pa.ListArray.from_arrays(offsets, logprobs.reshape(-1)),
    }
    write_table(out / "teacher.parquet", columns, TEACHER_SCHEMA)
    return {"tokens": sum(lengths)}


def _likeliest(
    model: Any, sequences: Sequence[list[int]], distillation: DistillationConfig, batch: Sequence[int]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The top tokens at every position of some sequences, and their log-probabilities: [positions, top] each."""
    documents = [Document(sequences[i]) for i in batch]
    states = packed_states(model, documents, torch.arange(sum(map(len, documents))))
    temperature, top = distillation.temperature, distillation.top
    found = [_logits(model, some, temperature).log_softmax(-1).topk(top) for some in _split(states)]
    tokens, logprobs = (
        torch.cat(parts) for parts in zip(*((likely.indices, likely.values) for likely in found), strict=True)
    )
    return tokens.cpu().numpy(), logprobs.cpu().numpy()


def _split(rows: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = rows.split(HEAD_POSITIONS)
    return parts


def _logits(model: Any, states: Tensor, temperature: float) -> Tensor:
    logits = head_logits(model, states).float()
    return logits if temperature == 1 else logits / temperature  # a copy as wide as the vocabulary is saved


def read_teacher(folder: Path) -> list[SoftTargets]:
    """What `teach` wrote, in the order of its source."""
    table = read_table(folder / "teacher.parquet", TEACHER_SCHEMA)
    found = []
    for row in range(len(table)):
        ids = tuple(table["input_ids"][row].as_py())
        tokens, logprobs = (
            torch.from_numpy(table[name][row].values.to_numpy(zero_copy_only=False).copy()).reshape(len(ids), -1)
            for name in ("tokens", "logprobs")
        )
        found.append(SoftTargets(ids, tokens.long(), logprobs))
    return found


def divergence(model: Any, states: Tensor, targets: SoftTargets, temperature: float) -> Tensor:
    """Mean Kullback-Leibler divergence of a student from its teacher over a sequence, in nats, times temperature².

    All tokens that were not kept count as one, so that this bounds the divergence of the whole distributions from
    below. Logits are recomputed in the backward pass: they are never held for more than a few hundred positions.

    Args:
        model: the student.
        states: what its head reads along the sequence, [length, hidden].
        targets: the teacher's.
        temperature: the one the teacher was asked at.
    """
    total = states.new_zeros((), dtype=torch.float32)
    parts = zip(_split(states), _split(targets.tokens), _split(targets.logprobs), strict=True)
    for some, tokens, logprobs in parts:
        given = (some, tokens.to(states.device), logprobs.to(states.device))
        total = total + checkpoint(partial(_divergence, model, temperature), *given, use_reentrant=False)
    return total * temperature**2 / len(states)


def _divergence(model: Any, temperature: float, states: Tensor, tokens: Tensor, logprobs: Tensor) -> Tensor:
    """Summed over positions: states [positions, hidden]; tokens, logprobs [positions, top]."""
    logits = _logits(model, states, temperature)
    mine = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
    others, theirs = _rest(mine), _rest(logprobs)
    return (logprobs.exp() * (logprobs - mine)).sum() + (theirs.exp() * (theirs - others)).sum()


def _rest(logprobs: Tensor) -> Tensor:
    """Log-probability of all tokens that were not kept: of what float32 can tell from none, at least."""
    return (-logprobs.exp().sum(-1)).clamp(min=-1 + 1e-7).log1p()
