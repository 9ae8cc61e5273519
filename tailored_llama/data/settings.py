"""What calibration sequences depend on, beside the tokenizer and the prompts."""

from __future__ import annotations

from dataclasses import dataclass

from tailored_llama.config import CalibrationConfig
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
    def of(cls, calibration: CalibrationConfig, seed: int) -> CalibrationSettings:
        texts = (DrawnText(find_text(part.text, "calibration"), part.samples) for part in calibration.parts)
        return cls(tuple(texts), calibration.tokens, seed)
