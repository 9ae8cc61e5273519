"""Sections on what is measured: scores, perplexity and speed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from tailored_llama.config.inputs import TextConfig
from tailored_llama.config.section import Section


class ScoringConfig(Section):
    """How many examples are scored, and with how many shots."""

    limit: int | None = Field(None, ge=1)
    """Examples of each evaluation split, evenly spaced over it; absent: all of them."""
    num_fewshot: int = Field(0, ge=0, le=64, description="Solved train examples put before each question.")


class PerplexityConfig(TextConfig):
    """The text that perplexity is measured on."""

    split: str = Field("validation", description="Benchmarks and Hub data sets: the split to read.")
    column: str = Field("passage", description="The column (or benchmark field) that holds the text.")
    window: int = Field(512, ge=16, le=32768, description="Tokens per window.")
    stride: int | None = Field(None, ge=1, le=32768)
    """Tokens from the start of one window to the next, at most the window. Overlapping tokens serve as context and are
    not scored again. Absent: the window, so no overlap, as in lm-evaluation-harness."""
    tokens: int | None = Field(8192, ge=16, description="Tokens read from the start of the text; absent: all of them.")

    @field_validator("stride")
    @classmethod
    def _stride_within_window(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value > (window := info.data.get("window", value)):
            raise ValueError(f"allowed: at most {window}, the window")
        return value


class ProfileConfig(Section):
    """What is timed: each pruned model, alternating with the dense one, on the machine that runs the stage."""

    batches: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = (1, 8)
    """Batch sizes in prompts, each measured separately; empty: no timing."""
    prompt_tokens: int = Field(128, ge=1, le=32768, description="Tokens in each prompt.")
    new_tokens: int = Field(32, ge=2, le=4096, description="Tokens generated after each prompt.")
    repeats: int = Field(5, ge=1, le=1000, description="Timed passes; the median is reported.")
