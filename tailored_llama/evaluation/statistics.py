"""Statistics of the reports: differences and ratios of two models, with paired bootstrap intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

RESAMPLES = 2000
ROUNDING = 1e-9  # far below one example's share of an accuracy
DISCORDANT = 0.15  # share of examples that a model and its smaller form do not both answer rightly or both wrongly
Z95 = 1.96  # standard errors on each side of a 95 % interval


@dataclass(frozen=True)
class Answers:
    """One model's results, one entry per example."""

    examples: Array  # int [n]: rows in the split
    answers: Array  # int (the right choice) or str (the accepted texts) [n]
    values: Array  # float [n]: 1 for right, 0 for wrong; F1 may lie between

    def take(self, rows: Any) -> "Answers":
        """The results of some rows: a slice, or a mask."""
        return Answers(self.examples[rows], self.answers[rows], self.values[rows])


@dataclass(frozen=True)
class Estimate:
    """A figure that compares two models, and its values on bootstrap resamples of their shared examples."""

    value: float
    draws: Array  # float64 [resamples]


def chance_corrected(tailored: float, dense: float, floor: float) -> float:
    """(tailored − floor) ÷ (dense − floor): how much of the dense model's skill is left; NaN if dense ≤ floor."""
    return (tailored - floor) / (dense - floor) if dense > floor else math.nan


def above_floor(accuracy: float, stderr: float, floor: float) -> bool:
    """Return whether an accuracy is significantly above its floor: the whole 95 % interval lies above it."""
    return accuracy - Z95 * stderr > floor


def check_same_examples(first: Answers, other: Answers) -> None:
    """Raise ValueError, with the first difference, unless two models answered the same examples in the same order."""
    if len(first.examples) != len(other.examples):
        raise ValueError(f"{len(first.examples)} examples against {len(other.examples)}")
    for column, left, right in (("example", first.examples, other.examples), ("answer", first.answers, other.answers)):
        if len(differ := np.flatnonzero(left != right)):
            row = int(differ[0])
            raise ValueError(f"row {row}: {column} {left[row]} against {right[row]}")


def paired_draws(
    first: Answers, other: Answers, seed: int = 0, benchmark: str = "", resamples: int = RESAMPLES
) -> tuple[Array, Array]:
    """Mean values of both models on bootstrap resamples of their shared examples, float64 [resamples] each.

    Every benchmark has draws of its own. Examples with the same pair of values are interchangeable, so drawing n of
    them with replacement is one multinomial draw of the counts of each pair.

    Raises:
        ValueError: the models did not answer the same examples, or there are none.
    """
    check_same_examples(first, other)
    if not (total := len(first.examples)):
        raise ValueError("0 examples")
    pairs, counts = np.unique(np.stack([first.values, other.values]).astype(float), axis=1, return_counts=True)
    generator = np.random.default_rng([seed, *benchmark.encode()])
    drawn = generator.multinomial(total, counts / total, size=resamples) / total
    return drawn @ pairs[0], drawn @ pairs[1]


def difference(first: Answers, other: Answers, seed: int = 0, benchmark: str = "") -> Estimate:
    """The mean value of one model − another's, by `paired_draws`."""
    value = float(first.values.mean() - other.values.mean())
    return Estimate(value, np.subtract(*paired_draws(first, other, seed, benchmark)))


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over benchmarks, each of which was resampled by itself."""
    with np.errstate(invalid="ignore"):  # ∞ − ∞, if resamples of two benchmarks are unbounded
        draws = np.mean([estimate.draws for estimate in estimates], axis=0)
    return Estimate(float(np.mean([estimate.value for estimate in estimates])), draws)


def detectable_difference(examples: int) -> float:
    """The smallest difference in accuracy, from 0 to 1, whose paired 95 % interval excludes 0; for planning.

    The standard error of a difference between accuracies on the same examples is √(discordant ÷ examples), where the
    difference itself is small (McNemar 1947; arXiv 2411.00640 on paired comparisons).
    """
    return Z95 * math.sqrt(DISCORDANT / examples)


def ratios(tailored: Array, dense: Array, floor: float = 0.0) -> Array:
    """`chance_corrected` of resampled accuracies, float64 [resamples].

    If a resample puts dense at or below the floor, the ratio is unbounded on the side of tailored: ±∞, or NaN if
    tailored is at the floor too. Leaving these out would make an interval too narrow exactly where it is wide.
    """
    above = dense - floor > ROUNDING
    gained = np.where(np.abs(tailored - floor) > ROUNDING, tailored - floor, 0.0)
    unbounded = np.where(gained == 0, np.nan, np.copysign(np.inf, gained))
    return np.asarray(np.where(above, gained / np.where(above, dense - floor, 1.0), unbounded))


def interval(values: Array) -> tuple[float, float]:
    """The 2.5 % and 97.5 % order statistics of resampled values; NaN, NaN if none is defined."""
    known = np.sort(values[~np.isnan(values)])  # order statistics: interpolating between infinities gives NaN
    if not len(known):
        return math.nan, math.nan
    return float(known[math.floor(0.025 * len(known))]), float(known[math.ceil(0.975 * len(known)) - 1])
