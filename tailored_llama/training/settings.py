"""What teacher outputs, healed checkpoints and adapters depend on, beside the artifacts that they are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tailored_llama.config import (
    AdapterConfig,
    Metric,
    Quantization,
    RunConfig,
    TrainingConfig,
    named_benchmark,
    narrow,
    reserved_tokens,
    with_defaults,
)
from tailored_llama.data import headline_metric


@dataclass(frozen=True)
class TeachSettings:
    """The temperature of teacher outputs, and how many of the likeliest tokens are kept.

    `reserved` tokens of the context are left to a soft prompt.
    """

    temperature: float
    top: int
    reserved: int = 0

    @classmethod
    def of(cls, config: RunConfig, shots: bool = False) -> TeachSettings:
        """`shots`: the outputs are along the shots, which a soft prompt may precede."""
        reserved = reserved_tokens(config.tuning) if shots else 0
        return cls(config.distillation.temperature, config.distillation.top, reserved)


@dataclass(frozen=True)
class HealSettings:
    """Adapter and optimiser of healing, the teacher's temperature, the seed, and how many texts are held out."""

    training: TrainingConfig
    temperature: float
    quantization: Quantization
    seed: int
    held_out: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> HealSettings:
        unread = ("rank", "alpha", "dropout", "targets") if config.healing.variant == "full" else ()
        training = with_defaults(narrow(config.healing, TrainingConfig), *unread)
        quantization, held_out = config.model.quantization, config.healing.held_out
        return cls(training, config.distillation.temperature, quantization, config.seed, held_out)


@dataclass(frozen=True)
class TuneSettings:
    """How an adapter is tuned.

    Args:
        adapter: adapter, optimiser, epochs and patience.
        metrics: the headline metric of every benchmark, in the order in which they give their parts of the examples.
        shots: examples to train on, of all benchmarks together.
        held_out: examples to stop on and to compare with.
        quantization: of the model while the adapter is trained on it.
        seed: of the adapter, the order and dropout.
        weight: of the divergence from the teacher; 0: there is none.
        temperature: of the teacher's distributions.
        sequences: texts with teacher outputs added to each step.
    """

    adapter: AdapterConfig
    metrics: tuple[tuple[str, Metric], ...]
    shots: int
    held_out: int
    quantization: Quantization
    seed: int
    weight: float = 0.0
    temperature: float = 1.0
    sequences: int = 0

    @classmethod
    def of(cls, config: RunConfig, names: Sequence[str], taught: bool = False, text: bool = False) -> TuneSettings:
        """For benchmarks by name; `taught`, `text`: there are teacher outputs along the shots, and along a text."""
        tuning, distillation = config.tuning, config.distillation
        unread = ("rank", "alpha", "dropout", "targets") if tuning.variant == "prompt" else ("virtual_tokens",)
        adapter = with_defaults(narrow(tuning, AdapterConfig), *unread, *(() if tuning.held_out else ("patience",)))
        metrics = tuple((name, headline_metric(named_benchmark(config, name))) for name in names)
        own = cls(adapter, metrics, tuning.shots, tuning.held_out, config.model.quantization, config.seed)
        if not taught:
            return own
        sequences = distillation.sequences if text else 0
        return replace(own, weight=distillation.weight, temperature=distillation.temperature, sequences=sequences)
