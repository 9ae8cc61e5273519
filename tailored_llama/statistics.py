"""Statistics of the report: recovery, its chance-corrected form, and their paired bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

RESAMPLES = 2000
Z95 = 1.96  # standard errors on each side of a 95 % interval


@dataclass(frozen=True)
class Answers:
    """What one model answered, one entry per example: its row in the split, the right choice, whether it was hit."""

    examples: Array  # int [n]
    answers: Array  # int [n]
    right: Array  # bool [n]


def recovery(tailored: float, dense: float) -> float:
    """Tailored accuracy ÷ dense accuracy; NaN where dense is 0."""
    return chance_corrected(tailored, dense, 0.0)


def chance_corrected(tailored: float, dense: float, floor: float) -> float:
    """(tailored − floor) ÷ (dense − floor): how much of what dense knows is left; NaN where dense ≤ floor."""
    return (tailored - floor) / (dense - floor) if dense > floor else math.nan


def above_floor(accuracy: float, stderr: float, floor: float) -> bool:
    """Whether an accuracy is significantly above its floor: the whole 95 % interval lies above it."""
    return accuracy - Z95 * stderr > floor


def check_same_examples(one: Answers, other: Answers) -> None:
    """Check that two models answered the same questions in the same order.

    Raises:
        ValueError: their numbers, example ids or right answers differ; the first difference is named.
    """
    if len(one.examples) != len(other.examples):
        raise ValueError(f"{len(one.examples)} examples against {len(other.examples)}")
    for what, mine, theirs in (
        ("example", one.examples, other.examples),
        ("answer", one.answers, other.answers),
    ):
        if len(differ := np.flatnonzero(mine != theirs)):
            row = int(differ[0])
            raise ValueError(f"row {row}: {what} {mine[row]} against {theirs[row]}")


def paired_draws(
    tailored: Answers, dense: Answers, seed: int | Sequence[int] = 0, resamples: int = RESAMPLES
) -> tuple[Array, Array]:
    """Accuracies of both models on bootstrap resamples of the examples they share.

    An example is in one of four states (both right, one of them, neither), so that drawing n examples with replacement
    is one multinomial draw of four counts: exact, and independent of n.

    Returns:
        The tailored and the dense accuracies, float64 [resamples] each.

    Raises:
        ValueError: the models did not answer the same examples, or there are none.
    """
    check_same_examples(tailored, dense)
    if not len(dense.examples):
        raise ValueError("0 examples")
    state = np.bincount(2 * tailored.right.astype(int) + dense.right.astype(int), minlength=4)
    total = len(dense.examples)
    counts = np.random.default_rng(seed).multinomial(total, state / total, size=resamples)
    return (counts[:, 2] + counts[:, 3]) / total, (counts[:, 1] + counts[:, 3]) / total


def ratios(tailored: Array, dense: Array, floor: float = 0.0) -> Array:
    """`chance_corrected` of resampled accuracies, float64 [resamples].

    Where a resample puts dense at or below the floor, the ratio has no bound on the side of tailored: ±∞ (NaN where
    tailored is at the floor as well). Leaving those out would make an interval too narrow exactly where it is wide.
    """
    above = dense > floor
    gained = tailored - floor
    unbounded = np.where(gained == 0, np.nan, np.copysign(np.inf, gained))
    return np.asarray(np.where(above, gained / np.where(above, dense - floor, 1.0), unbounded))


def interval(values: Array) -> tuple[float, float]:
    """The 2.5 % and 97.5 % order statistics of resampled values; NaN, NaN where none is defined."""
    known = np.sort(values[~np.isnan(values)])  # order statistics: interpolating between infinities gives NaN
    if not len(known):
        return math.nan, math.nan
    return float(known[math.floor(0.025 * len(known))]), float(known[math.ceil(0.975 * len(known)) - 1])
