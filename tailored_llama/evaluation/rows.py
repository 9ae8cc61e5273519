"""Rows of `profile.parquet`: what a model costs to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tailored_llama.store import read_rows


@dataclass(frozen=True)
class ProfileRow:
    """One row of `profile.parquet`: a checkpoint at a batch size.

    Every ratio is the other checkpoint's cost ÷ this one's: above 1, this one costs less. Rows of the other checkpoint
    have none. A speed-up is the median over pairs of neighbouring passes; `_low` and `_high` are the extremes.
    """

    role: str  # checkpoint or against
    checkpoint: str
    parameters: int
    weight_bytes: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    device: str
    threads: int  # of the CPU
    dtype: str
    prefill_tokens_per_second: float  # medians, for the whole batch
    decode_tokens_per_second: float
    peak_memory_bytes: int
    base_memory_bytes: int  # its part from before loading: interpreter and libraries; CUDA: 0
    prefill_speedup: float | None = None
    prefill_speedup_low: float | None = None
    prefill_speedup_high: float | None = None
    decode_speedup: float | None = None
    decode_speedup_low: float | None = None
    decode_speedup_high: float | None = None


def read_profile(folder: Path) -> list[ProfileRow]:
    """The rows of `profile.parquet`.

    Raises:
        InputError: the file is missing, broken or of another schema.
    """
    return read_rows(folder / "profile.parquet", ProfileRow)
