"""The settings of scores and perplexities, beside the artifacts that these are measured on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from tailored_llama.config import (
    BenchmarkConfig,
    Ignored,
    Metric,
    PerplexityConfig,
    is_written,
    new_tokens,
    stop_strings,
)
from tailored_llama.data import PromptSplit, TextSource, find_text, headline_metric


@dataclass(frozen=True)
class WrittenAnswer:
    """The limits of a written answer, beside the end-of-text token, and what `exact_match` ignores of it."""

    max_new_tokens: int  # 0: it is one of the choices, if these are the same for all rows
    stop: Sequence[str] = ()  # strings, which are left out themselves
    ignore: tuple[Ignored, ...] | None = None  # None: SQuAD's normal form is compared


@dataclass(frozen=True)
class ScoreSettings:
    """The settings of scores: the benchmark, its headline metric, the scored split, and how answers are written."""

    benchmark: str
    metric: Metric
    split: PromptSplit = "evaluation"
    written: WrittenAnswer | None = None  # None: choices are ranked

    @classmethod
    def of(cls, benchmark: BenchmarkConfig, split: PromptSplit = "evaluation", writes_labels: bool = False) -> Self:
        written = WrittenAnswer(0) if writes_labels else None
        if is_written(benchmark):
            written = WrittenAnswer(new_tokens(benchmark), stop_strings(benchmark), benchmark.ignore)
        return cls(benchmark.name, headline_metric(benchmark), split, written)


@dataclass(frozen=True)
class PerplexitySettings:
    """The text of a perplexity, and the windows over it."""

    text: TextSource
    tokens: int | None  # that are read; None: all
    window: int

    @classmethod
    def of(cls, text: PerplexityConfig) -> Self:
        return cls(find_text(text, "perplexity"), text.tokens, text.window)
