"""What is trained on, its loss, and what a model with or without an adapter does on held-out examples.

The loss is that of an example's right choice, the divergence from a teacher's distribution, or both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tailored_llama.config import TrainingConfig
from tailored_llama.errors import InputError
from tailored_llama.models import (
    Document,
    Encoded,
    IdTable,
    head_logits,
    learnt_header,
    packed_attention,
    packed_states,
    row_of,
    within_memory,
)
from tailored_llama.training.alignment import in_pieces
from tailored_llama.training.distillation import SoftTargets, Teacher, divergence
from tailored_llama.training.records import Outcome

_AT_ONCE = 8  # positions whose probabilities are in memory at once


@dataclass(frozen=True)
class Sample:
    """One sample: an example's right choice to train on, all its choices to compare, or text."""

    encoded: Encoded
    answer: int = 0
    scales: tuple[float, ...] = ()  # by choice: makes their log-likelihoods comparable; empty: plain text
    teacher: SoftTargets | None = None  # along the prefix and the right choice

    def __len__(self) -> int:
        return len(self.encoded.document)

    def sequence(self) -> list[int]:
        """Token ids of the prefix and the right choice."""
        document = self.encoded.document
        return [*document.prefix, *(document.branches[self.answer] if document.branches else ())]

    def positions(self) -> list[int]:
        """Positions of `sequence` in the packed document."""
        return [self.encoded.document.offset(self.answer, i) for i in range(len(self.sequence()))]


@dataclass(frozen=True)
class Objective:
    """Weight and temperature of the divergence from a teacher; see `sample_losses`."""

    distillation: float = 0.0
    temperature: float = 1.0


def with_teacher(samples: Sequence[Sample], teacher: Path, table: IdTable | None = None) -> list[Sample]:
    """Add to each sample the teacher outputs that `distillation.teach` wrote for it, in the same order.

    `table` leads from the teacher's tokens to the samples', if the vocabulary was trimmed.

    Raises:
        InputError: the teacher read other tokens, or another text.
    """
    outputs = list(Teacher(teacher))
    if table and len(outputs) == len(samples):
        outputs = [in_pieces(out, table, own.sequence()) for out, own in zip(outputs, samples, strict=True)]
    if [sample.sequence() for sample in samples] != [list(targets.input_ids) for targets in outputs]:
        raise InputError(
            f"teacher {teacher}: got outputs along other tokens; allowed: those of `teach` for the same prompts and "
            "the same tokenizer"
        )
    return [replace(sample, teacher=targets) for sample, targets in zip(samples, outputs, strict=True)]


class TextSamples(Sequence[Sample]):
    """One sample for each sequence of a text. Its teacher outputs are read from disk on access.

    `teacher` has what `distillation.teach` wrote; `table` is as in `with_teacher`; `part` are the sequences meant.
    """

    def __init__(self, teacher: Path, table: IdTable | None = None, part: slice = slice(None)) -> None:
        self._outputs, self._table = Teacher(teacher), table
        self._numbers = range(len(self._outputs))[part]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        targets = self._outputs[self._numbers[index]]
        targets = in_pieces(targets, self._table) if self._table else targets
        return Sample(Encoded(Document(targets.input_ids), ()), teacher=targets)


def autocast(model: Any, training: TrainingConfig) -> torch.autocast:
    """Matrix products in the configured precision."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=training.precision == "bfloat16")


def sample_losses(model: Any, batch: Sequence[Sample], objective: Objective) -> Iterator[tuple[Tensor, Tensor]]:
    """Loss of every sample of a packed row, and the unweighted divergence in it.

    An example's loss is the mean negative log-likelihood of its right continuation's tokens. If it has a teacher, the
    divergence from it times `distillation` is added. Plain text has only the divergence.
    """
    states, starts, choices = choice_losses(model, batch)
    for start, sample, own in zip(starts, batch, choices, strict=True):
        loss = own[sample.answer].mean() if own else torch.zeros(())
        distance = states.new_zeros((), dtype=torch.float32)
        if sample.teacher is not None and objective.distillation:
            sequence_states = states[[start + position for position in sample.positions()]]
            distance = divergence(model, sequence_states, sample.teacher, objective.temperature)
        yield loss + objective.distillation * distance, distance


def choice_losses(model: Any, batch: Sequence[Sample]) -> tuple[Tensor, list[int], list[list[Tensor]]]:
    """One forward pass over a packed row.

    Returns:
        The head's inputs along the row, [tokens, hidden]; where each sample starts; and for each sample the negative
        log-likelihoods of every choice's tokens, in nats.
    """
    row = row_of([sample.encoded for sample in batch])
    lengths = list(map(len, row.documents))
    states = packed_states(model, row.documents, torch.arange(sum(lengths)), learnt_header(model))
    starts = list(itertools.accumulate(lengths, initial=0))[:-1]
    sizes = [len(tokens) for sample in batch for tokens in sample.encoded.targets]
    logits = head_logits(model, states[row.positions])  # all choices at once, so that the head is read only once
    losses = _token_losses(logits, torch.tensor(row.targets, dtype=torch.int64, device=logits.device))
    parts = iter(losses.split(sizes))
    return states, starts, [[next(parts) for _ in sample.scales] for sample in batch]


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods of target tokens in float32, [positions], from logits [positions, vocabulary]."""
    if logits.device.type == "cpu" and logits.dtype == torch.bfloat16:
        losses: Tensor = _LossesInParts.apply(logits, targets)  # type: ignore[no-untyped-call]
        return losses
    return cross_entropy(logits.float(), targets, reduction="none")


class _LossesInParts(torch.autograd.Function):
    """Cross-entropies and their gradient in one pass over few positions at a time.

    Probabilities of all positions in float32 would take several times as long: their memory is faulted in every time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        gradient, losses = torch.empty_like(logits), []
        for part, own, wanted in zip(*(each.split(_AT_ONCE) for each in (logits, gradient, targets)), strict=True):
            logprobs = part.float().log_softmax(-1)
            losses.append(-logprobs.gather(1, wanted[:, None])[:, 0])
            own.copy_(logprobs.exp_().scatter_add_(1, wanted[:, None], -torch.ones_like(losses[-1])[:, None]))
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, of_losses: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * of_losses[:, None].to(gradient.dtype), None


def outcomes(
    model: Any, samples: Sequence[Sample], training: TrainingConfig, budget: int, temperature: float = 1.0
) -> list[Outcome]:
    """What a model, with or without an adapter, does on held-out samples, in their order.

    Args:
        samples: with all choices encoded; one choice alone is a written answer; none is text with a teacher.
        budget: tokens per pass.
        temperature: of the divergence from the teacher of a text.
    """
    model.eval()
    by_number: dict[int, Outcome] = {}

    def run(part: list[int]) -> list[Outcome]:
        batch = [samples[i] for i in part]
        with autocast(model, training):
            states, starts, choices = choice_losses(model, batch)
            results = []
            for start, own, sample in zip(starts, choices, batch, strict=True):
                if sample.teacher is None or own:
                    results.append(_outcome(own, sample))
                else:
                    text = states[start : start + len(sample)]
                    distance = float(divergence(model, text, sample.teacher, temperature))
                    results.append(Outcome(distance, None, distance))
        return results

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad(), packed_attention(base):  # FSDP cannot train weights that it gathered in inference mode
        for part, results in within_memory([len(sample) for sample in samples], budget, run):
            by_number |= dict(zip(part, results, strict=True))
    return [by_number[i] for i in range(len(samples))]


def _outcome(choices: Sequence[Tensor], sample: Sample) -> Outcome:
    answer_loss = float(choices[sample.answer].mean())
    if len(choices) == 1:
        return Outcome(answer_loss, None, answer_loss)
    scores = torch.stack([-c.sum() * scale for c, scale in zip(choices, sample.scales, strict=True)])
    loss = cross_entropy(scores, torch.tensor(sample.answer, device=scores.device))
    return Outcome(float(loss), int(scores.argmax()) == sample.answer, answer_loss)


def training_loss(held_out: Sequence[Outcome]) -> float:
    """Mean over held-out samples of the loss that training lowers: of examples without, of texts the divergence."""
    return sum(outcome.answer_loss for outcome in held_out) / len(held_out)
