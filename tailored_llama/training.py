"""Training an adapter: the loss of packed examples, micro-batches that fit into memory, and the loop."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import cross_entropy

from tailored_llama.artifacts import write_table
from tailored_llama.config import TrainingConfig
from tailored_llama.distillation import SoftTargets, divergence, read_teacher
from tailored_llama.errors import InputError
from tailored_llama.memory import out_of_memory
from tailored_llama.models import head_logits
from tailored_llama.packing import Document, batches, halved, packed_attention, packed_states, within_memory
from tailored_llama.progress import Progress
from tailored_llama.resume import State, load_state, save_state
from tailored_llama.scoring import Encoded
from tailored_llama.soft_prompts import learnt_header

_log = logging.getLogger(__name__)

LOG_SCHEMA = pa.schema(
    {
        "step": pa.int32(),
        "epoch": pa.int32(),
        "loss": pa.float64(),
        "divergence": pa.float64(),  # the part of the loss that is distance to the dense model, unweighted
        "learning_rate": pa.float64(),
        "held_out_loss": pa.float64(),  # at the last step of an epoch, and before the first
    }
)


@dataclass(frozen=True)
class Sample:
    """What is learnt from at once: an example's right choice, all its choices where they are ranked, or plain text."""

    encoded: Encoded
    answer: int = 0
    scales: tuple[float, ...] = ()  # of each choice: what makes their log-likelihoods comparable; none: plain text
    teacher: SoftTargets | None = None  # along the prefix and the right choice

    def __len__(self) -> int:
        return len(self.encoded.document)

    def sequence(self) -> list[int]:
        """Token ids of the prefix and the right choice."""
        document = self.encoded.document
        return [*document.prefix, *(document.branches[self.answer] if document.branches else ())]

    def places(self) -> list[int]:
        """Where they stand in the packed document."""
        return [self.encoded.document.offset(self.answer, place) for place in range(len(self.sequence()))]


@dataclass(frozen=True)
class Objective:
    """What is made small: see `sample_losses`."""

    ranking: float = 0.0
    distillation: float = 0.0
    temperature: float = 1.0


def with_teacher(samples: Sequence[Sample], teacher: Path) -> list[Sample]:
    """The samples with what `distillation.teach` wrote along each of them, in the same order.

    Raises:
        InputError: it read other tokens.
    """
    found = read_teacher(teacher)
    if [sample.sequence() for sample in samples] != [list(targets.input_ids) for targets in found]:
        raise InputError(
            f"teacher {teacher}: was asked along other tokens; allowed: what `teach` made of the same prompts, with "
            "the same tokenizer"
        )
    return [replace(sample, teacher=targets) for sample, targets in zip(samples, found, strict=True)]


def text_samples(teacher: Path) -> list[Sample]:
    """Every sequence of a text with what the dense model says along it (`distillation.teach`)."""
    return [Sample(Encoded(Document(t.input_ids), (), ()), teacher=t) for t in read_teacher(teacher)]


def sample_losses(model: Any, batch: Sequence[Sample], objective: Objective) -> Iterator[tuple[Tensor, Tensor]]:
    """The loss of every sample of a packed row, and the part of it that is divergence, unweighted.

    An example's loss is the mean negative log-likelihood of its right continuation's tokens, plus, where its choices
    are ranked, the cross-entropy over them times `ranking`, plus, where it has a teacher, the divergence from it times
    `distillation`. Plain text has the last one only.
    """
    documents = [sample.encoded.document for sample in batch]
    states = packed_states(model, documents, torch.arange(sum(map(len, documents))), learnt_header(model))
    starts = list(itertools.accumulate(map(len, documents), initial=0))
    positions: list[int] = []
    targets: list[int] = []
    sizes: list[int] = []  # tokens of every choice
    for start, sample in zip(starts, batch, strict=False):
        for places, wanted in zip(sample.encoded.positions, sample.encoded.targets, strict=True):
            positions += [start + place for place in places]
            targets += wanted
            sizes.append(len(wanted))
    logits = head_logits(model, states[positions]).float()  # of all choices at once: the head is read a single time
    losses = cross_entropy(logits, torch.tensor(targets, dtype=torch.int64, device=logits.device), reduction="none")
    choices = iter(losses.split(sizes))
    for start, sample in zip(starts, batch, strict=False):
        loss = _choice_loss([next(choices) for _ in sample.scales], sample, objective.ranking)
        distance = losses.new_zeros(())
        if sample.teacher is not None and objective.distillation:
            along = states[[start + place for place in sample.places()]]
            distance = divergence(model, along, sample.teacher, objective.temperature)
        yield loss + objective.distillation * distance, distance


def _choice_loss(choices: Sequence[Tensor], sample: Sample, ranking: float) -> Tensor:
    """Of an example, from the losses of the tokens of its choices."""
    if not choices:
        return torch.zeros(())
    loss = choices[sample.answer].mean()
    if ranking and len(choices) > 1:
        scores = torch.stack([-c.sum() * scale for c, scale in zip(choices, sample.scales, strict=True)])
        loss = loss + ranking * cross_entropy(scores, torch.tensor(sample.answer, device=scores.device))
    return loss


def _add_gradients(
    model: Any, batch: Sequence[Sample], shares: Sequence[float], training: TrainingConfig, objective: Objective
) -> tuple[float, float]:
    """In a function of its own, so that nothing holds on to the graph of a pass that did not fit."""
    with _autocast(model, training):
        pairs = list(sample_losses(model, batch, objective))
        loss = torch.stack([share * one for share, (one, _) in zip(shares, pairs, strict=True)]).sum()
    loss.backward()
    return loss.item(), sum(share * other.item() for share, (_, other) in zip(shares, pairs, strict=True))


def _autocast(model: Any, training: TrainingConfig) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=training.precision == "bfloat16")


def _backward(
    model: Any,
    batch: Sequence[Sample],
    shares: Sequence[float],
    training: TrainingConfig,
    objective: Objective,
    budget: int,
) -> tuple[float, float, int]:
    """Accumulate the gradients of a step in micro-batches; halve them, and begin again, where memory runs out.

    Args:
        shares: what each sample's loss is multiplied by.
        budget: tokens of a micro-batch.

    Returns:
        The loss, the divergence in it, and the tokens of a micro-batch that did fit.
    """
    while True:
        loss = distance = 0.0
        parts = batches([len(sample) for sample in batch], budget)
        try:
            for part in parts:
                some, weights = [batch[i] for i in part], [shares[i] for i in part]
                found = _add_gradients(model, some, weights, training, objective)
                loss, distance = loss + found[0], distance + found[1]
            return loss, distance, budget
        except (RuntimeError, MemoryError) as error:
            if len(parts) == len(batch) or not out_of_memory(error):
                raise
        model.zero_grad()  # those of the parts that did fit
        budget = halved(min(budget, max(sum(len(batch[i]) for i in part) for part in parts)))


def _held_out_loss(
    model: Any, samples: Sequence[Sample], training: TrainingConfig, objective: Objective, budget: int
) -> float:
    model.eval()

    def part_loss(part: list[int]) -> float:
        with _autocast(model, training):
            return sum(float(loss) for loss, _ in sample_losses(model, [samples[i] for i in part], objective))

    with torch.inference_mode():
        total = sum(loss for _, loss in within_memory([len(sample) for sample in samples], budget, part_loss))
    return total / len(samples)


def train(
    model: Any,
    samples: Sequence[Sample],
    training: TrainingConfig,
    objective: Objective,
    seed: int,
    progress: Progress,
    *,
    epochs: int = 1,
    held_out: Sequence[Sample] = (),
    patience: int = 1,
    texts: Sequence[Sample] = (),
    texts_per_step: int = 0,
    resume: Path | None = None,
    every: int = 0,
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Train an adapter; leave the one with the lowest loss on the held-out samples, the untrained one included.

    Samples come in random order, `batch_size` in a step; the loss of a step is the mean over them, plus that over
    `texts_per_step` of the texts, which come round and round. Deterministic by seed on a CPU.

    Args:
        model: what `adapted` made; what is random in it has been seeded.
        samples: what is learnt from.
        training: adapter and optimiser.
        objective: the loss.
        seed: of the order.
        progress: told of every step.
        epochs: passes over the samples, at most.
        held_out: samples for early stopping, judged without a teacher; none: no stopping.
        patience: epochs without a lower held-out loss before training stops.
        texts: further samples.
        texts_per_step: how many of them stand beside the samples of a step.
        resume: a folder of this very training's state, which is taken up where it is there.
        every: steps between two states that are kept there; 0: none.

    Returns:
        The columns of `log.parquet`, and what was measured: tokens/s, epochs.

    Raises:
        FloatingPointError: the loss is not a finite number; the step is named.
    """
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=training.learning_rate)
    per_epoch = math.ceil(len(samples) / training.batch_size)
    steps, tokens, begun = per_epoch * epochs, 0, time.perf_counter()
    state = State(training.micro_batch_tokens, math.inf, _copy(model), {name: [] for name in LOG_SCHEMA.names})
    if resume:
        load_state(resume, state, model, optimiser)
    with packed_attention(model.get_base_model()):
        if held_out and not state.step:
            state.best = _held_out_loss(model, held_out, training, objective, state.budget)
            tokens += sum(map(len, held_out))
            _append(state.log, step=0, epoch=0, held_out_loss=state.best)
        while state.step < steps and state.worse < patience:
            epoch, place = divmod(state.step, per_epoch)
            state.step += 1
            rate = learning_rate(state.step, steps, training)
            for group in optimiser.param_groups:
                group["lr"] = rate
            first = place * training.batch_size
            batch = [samples[i] for i in _order(len(samples), seed, epoch)[first : first + training.batch_size]]
            shares = [1 / len(batch)] * len(batch)
            if beside := _beside(texts, texts_per_step, seed, state.step):
                batch, shares = batch + beside, shares + [1 / len(beside)] * len(beside)
            model.train()
            loss, distance, state.budget = _backward(model, batch, shares, training, objective, state.budget)
            if not math.isfinite(loss):
                raise FloatingPointError(f"training: loss is {loss} at step {state.step} of {steps}")
            optimiser.step()
            optimiser.zero_grad()
            tokens += sum(map(len, batch))
            asked = distance if objective.distillation else None
            _append(state.log, step=state.step, epoch=epoch + 1, loss=loss, divergence=asked, learning_rate=rate)
            progress(state.step, steps)
            if not held_out and state.step % math.ceil(steps / 10) == 0:
                _log.info("step %d of %d: loss %.4f", state.step, steps, loss)
            if held_out and place + 1 == per_epoch:
                held = state.log["held_out_loss"][-1] = _held_out_loss(
                    model, held_out, training, objective, state.budget
                )
                tokens += sum(map(len, held_out))
                _log.info("epoch %d of %d: loss %.4f, held out %.4f", epoch + 1, epochs, loss, held)
                if held < state.best:
                    state.best, state.best_adapter, state.worse = held, _copy(model), 0
                else:
                    state.worse += 1
            if resume and every and state.step % every == 0:
                save_state(resume, state, model, optimiser)
    if held_out:
        set_peft_model_state_dict(model, state.best_adapter)
    progress(steps, steps)
    rate_of_tokens = round(tokens / (time.perf_counter() - begun), 1)
    return state.log, {"tokens": tokens, "tokens_per_second": rate_of_tokens, "epochs": max(state.log["epoch"])}


def _order(count: int, *seed: int) -> list[int]:
    """A random order that a training which goes on in the middle finds again."""
    return [int(i) for i in np.random.default_rng(seed).permutation(count)]


def _beside(texts: Sequence[Sample], count: int, seed: int, step: int) -> list[Sample]:
    """The texts of a step: all of them in random order, round and round."""
    if not texts:
        return []
    places = (divmod(place, len(texts)) for place in range((step - 1) * count, step * count))
    return [texts[_order(len(texts), seed, turn, 1)[place]] for turn, place in places]


def learning_rate(step: int, steps: int, training: TrainingConfig) -> float:
    """Linear warm-up, then a half cosine to zero (or constant); steps count from 1."""
    warmup = round(training.warmup * steps)
    if step <= warmup:
        return training.learning_rate * step / warmup
    if training.schedule == "constant":
        return training.learning_rate
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup - 1) / max(1, steps - warmup)))


def _copy(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def _append(log: dict[str, list[Any]], **row: Any) -> None:
    for name, column in log.items():
        column.append(row.get(name))


def write_log(log: dict[str, list[Any]], out: Path) -> None:
    """Write `log.parquet`."""
    write_table(out / "log.parquet", log, LOG_SCHEMA)
