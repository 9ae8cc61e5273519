"""What calibration sequences depend on, beside the tokenizer and the prompts."""

from __future__ import annotations

from dataclasses import dataclass

from tailored_llama.config import CalibrationPart, RunConfig
from tailored_llama.data.benchmarks import has_train
from tailored_llama.data.texts import TextSource, find_text


@dataclass(frozen=True)
class DrawnText:
    """A text, and the number of sequences drawn from it."""

    source: TextSource
    samples: int


@dataclass(frozen=True)
class CalibrationSettings:
    """The texts of the calibration, the tokens of each sequence, and the seed of the draw."""

    texts: tuple[DrawnText, ...]
    tokens: int
    seed: int

    @classmethod
    def of(cls, config: RunConfig) -> CalibrationSettings:
        parts = calibration_parts(config)
        texts = (DrawnText(find_text(part.text, "calibration", part.benchmark), part.samples) for part in parts)
        return cls(tuple(texts), config.calibration.tokens, config.seed)


def calibration_parts(config: RunConfig) -> tuple[CalibrationPart, ...]:
    """The texts of a run's calibration; its questions are those of the benchmarks with a train split."""
    return config.calibration.parts([benchmark for benchmark in config.benchmarks if has_train(benchmark)])
