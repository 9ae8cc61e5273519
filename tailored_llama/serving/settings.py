"""The settings of GGUF files and their scores, beside the checkpoint."""

from dataclasses import dataclass
from typing import Self

from tailored_llama.config import BenchmarkConfig, GgufType
from tailored_llama.data import PromptSplit
from tailored_llama.evaluation import ScoreSettings
from tailored_llama.models import ModelSource, base_of


@dataclass(frozen=True)
class GgufSettings:
    """The type of a GGUF file's matrices, and the model's name in it."""

    type: GgufType
    name: str


@dataclass(frozen=True)
class SourceSettings:
    """The GGUF file that a user started from, and the model's name."""

    source: ModelSource
    name: str


@dataclass(frozen=True)
class QuantisedSettings:
    """The type of the GGUF file whose weights are scored, and how they are."""

    type: GgufType
    score: ScoreSettings

    @classmethod
    def of(cls, benchmark: BenchmarkConfig, gguf_type: GgufType, split: PromptSplit = "evaluation") -> Self:
        return cls(gguf_type, ScoreSettings.of(benchmark, split))


def whole_type(source: ModelSource) -> GgufType:
    """The type of a file that rounds nothing of a base, which has so many bits; f16 where that is not known."""
    return "bf16" if base_of(source).half == "bfloat16" else "f16"


def bits_of(gguf_type: GgufType | None) -> float:
    """About how many bits a weight has in a GGUF file of this type, or in a checkpoint (None)."""
    whole = {None: 16.0, "f32": 32.0, "f16": 16.0, "bf16": 16.0}
    return whole[gguf_type] if gguf_type in whole else int(str(gguf_type).strip("iq")[0]) + 0.5  # the scales of blocks
