"""Proof that a model loses less than a margin against a reference, on rows that chose neither."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import scipy  # whose parts load when they are first used: half a second, which most commands need not wait for

from tailored_llama.evaluation.statistics import DISCORDANT, ROUNDING, Answers, Array, check_same_examples

POWER = 0.8  # with which the rows that are asked for prove a model that loses nothing
FIRST_SHARE = 0.8  # of the error that is left, for the next opening of the proving rows
TINY = 1e-12


@dataclass(frozen=True)
class Counts:
    """Rows by who answers them rightly."""

    both: int
    only_dense: int
    only_small: int
    neither: int

    @property
    def differing(self) -> int:
        """Rows that are answered differently, where rows that are answered alike count as right for both."""
        return self.only_dense + self.only_small + self.neither


@dataclass(frozen=True)
class Look:
    """A planned test on the first so many proving rows, and the level that its p is compared with."""

    rows: int
    level: float


@dataclass(frozen=True)
class LossTest:
    """A model against its reference on one benchmark; losses and the margin are shares, 0.03 for three points.

    With `looks`, only rows that the two answer differently have labels. `counts.both` is then the number of rows that
    are answered alike, and of `dense` and `small` only the difference has a meaning.
    """

    rows: int
    margin: float
    level: float  # the error that the test may make
    dense: float
    small: float
    bound: float  # the largest loss that the test does not exclude
    p: float  # of a loss of the margin or more
    counts: Counts | None  # None where answers are not just right or wrong
    nominal: float | None = None  # the level that p is compared with, lowered to keep `level`; None: that itself
    looks: tuple[Look, ...] = ()  # that were planned; this is the test of one of them
    missing: int = 0  # rows without a label that count as lost

    @property
    def labels(self) -> int:
        """The labels that it took: of all rows or, with looks, of those that the two answer differently."""
        counts = self.counts
        return counts.differing - self.missing if self.looks and counts else self.rows

    @property
    def loss(self) -> float:
        return self.dense - self.small

    @property
    def proven(self) -> bool:
        """Whether a loss of the margin or more is excluded."""
        return self.p <= (self.level if self.nominal is None else self.nominal)


def noninferiority_test(
    dense: Answers, small: Answers, margin: float, level: float, nominal: float | None = None
) -> LossTest:
    """Test, at a level such as 0.05, whether `small` loses less than a margin above 0 against `dense` on the same rows.

    The null hypothesis is a loss of the margin or more, so what was not measured well enough is not proven. Right and
    wrong answers are compared by the score test of Tango (Statistics in Medicine 17, 1998, p. 891), which Nam
    (Biometrics 53, 1997, p. 1422) gives for this hypothesis. Other values from 0 to 1, such as F1, are compared by the
    same test without counts (`tilted_score`). A t-test would not do: where few rows lose much, it calls
    more models proven than its level says. The error of the test on counts is exact (`exact_size`); that on other
    values is approximate.

    `nominal` is the level that p is compared with; None: the one that keeps `level` on so many rows.

    Raises:
        ValueError: the models did not answer the same rows, or fewer than two.
    """
    check_same_examples(dense, small)
    if (rows := len(dense.examples)) < 2:
        raise ValueError(f"{rows} rows; a test needs two")
    losses, counts = dense.values - small.values, counts_of(dense.values, small.values)
    if nominal is None and counts:
        nominal = nominal_level(rows, margin, level)
    return LossTest(
        rows=rows,
        margin=margin,
        level=level,
        dense=float(np.mean(dense.values)),
        small=float(np.mean(small.values)),
        bound=loss_bound(losses, nominal or level),
        p=p_value(losses, margin),
        counts=counts,
        nominal=nominal,
    )


def counts_of(dense: Array, small: Array) -> Counts | None:
    """How many rows each model answers rightly; None: values are not just 0 and 1."""
    if not np.isin([dense, small], (0, 1)).all():
        return None
    right, kept = dense == 1, small == 1
    return Counts(*(int(np.sum(pair)) for pair in (right & kept, right & ~kept, ~right & kept, ~right & ~kept)))


def p_value(losses: Array, margin: float) -> float:
    """The p-value of a true loss of the margin or more, from the loss on every row: −1, 0 and 1, or values between."""
    return float(scipy.stats.norm.cdf(_score(losses, margin)))


def loss_bound(losses: Array, level: float) -> float:
    """The largest loss that `p_value` does not exclude: the upper end of a one-sided interval."""
    if losses.min() == 1:
        return 1.0
    quantile, edge = float(scipy.stats.norm.ppf(level)), 1 - ROUNDING
    lowest = -edge if _are_whole(losses) else float(np.mean(losses))
    return float(scipy.optimize.brentq(lambda loss: _score(losses, loss) - quantile, lowest, edge))


def _score(losses: Array, loss: float) -> float:
    """The score statistic of a true loss, by counts where rows are lost or gained whole."""
    if _are_whole(losses):
        return score(int(np.sum(losses > 0)), int(np.sum(losses < 0)), len(losses), loss)
    return tilted_score(losses, loss)


def _are_whole(losses: Array) -> bool:
    return bool(np.isin(losses, (-1, 0, 1)).all())


def score(only_dense: int, only_small: int, rows: int, loss: float) -> float:
    """The score statistic of a true loss: standard normal under it, negative where less was measured.

    It is (b − c − n·δ) ÷ √(n·(2q + δ(1 − δ))), with b rows that only dense answers rightly, c that only the other
    model does, and q the likeliest share of the latter, given the loss δ (Tango 1998, equations 10 to 12).
    """
    if loss < 0:
        return -score(only_small, only_dense, rows, -loss)
    linear = -only_dense - only_small + (2 * rows - only_dense + only_small) * loss
    constant = -only_small * loss * (1 - loss)
    share = (math.sqrt(linear**2 - 8 * rows * constant) - linear) / (4 * rows)
    distance, variance = only_dense - only_small - rows * loss, rows * (2 * share + loss * (1 - loss))
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0


@functools.cache
def nominal_level(rows: int, margin: float, level: float) -> float:
    """The largest level, up to the stated one, at which the test on counts errs no more often than the stated one."""
    low = high = level
    while exact_size(rows, margin, low) > level:
        low, high = low / 2, low
    for _ in range(8 if low < high else 0):  # to 0.2 % of the level
        middle = (low + high) / 2
        low, high = (low, middle) if exact_size(rows, margin, middle) > level else (middle, high)
    return low


def exact_size(rows: int, margin: float, level: float) -> float:
    """How often the test on counts, at a level, calls a model proven that loses exactly the margin, at worst.

    It is the sum over all counts that pass, for the worst share q of rows that only the small model answers rightly; a
    model that loses more passes less often. Counts that are 7 standard deviations away are left out. The worst q is
    that of 400, and of 20 around it. Up to 150 rows, this differs from the whole sum by less than 0.0001 of the level.
    """
    quantile, gains, fewest = scipy.special.ndtri(level), 0, list[int]()  # gains that pass, beside 0, 1, … losses
    for losses in range(rows + 1):
        while gains <= rows - losses and score(losses, gains, rows, margin) > quantile:
            gains += 1
        if gains > rows - losses:
            break
        fewest.append(gains)
    lost, enough = np.arange(len(fewest)), np.array(fewest, dtype=float)
    ways = scipy.special.gammaln(rows + 1) - scipy.special.gammaln(lost + 1) - scipy.special.gammaln(rows - lost + 1)

    def passed(share: float) -> float:
        """How often a model passes that alone answers this share of the rows rightly."""
        of, other = share + margin, 1 - share - margin
        spread = 7 * math.sqrt(rows * of * other) + 7
        likely = slice(max(0, int(rows * of - spread)), int(rows * of + spread) + 1)
        b, rest = lost[likely], rows - lost[likely]
        chance = np.exp(ways[likely] + b * math.log(of) + rest * math.log(other))
        return float(np.sum(chance * scipy.special.bdtrc(enough[likely] - 1, rest, min(share / other, 1.0))))

    # Dense at the ends, where few rows differ or few agree, and the size changes most.
    shares = np.sin(np.linspace(0, np.pi / 2, 400)) ** 2 * (1 - margin) / 2
    sizes = [passed(share) for share in shares]
    worst = int(np.argmax(sizes))
    near = np.linspace(shares[max(worst - 1, 0)], shares[min(worst + 1, 399)], 22)
    return max(*sizes, *(passed(share) for share in near))


def tilted_score(losses: Array, loss: float) -> float:
    """The score statistic of a true mean loss, from a loss between −1 and 1 on every row.

    It is (mean − δ) ÷ √(variance ÷ n), with the variance of the likeliest distribution of losses whose mean is δ: the
    seen losses with other weights, and a loss of 1 that may not have been seen (Owen, Empirical Likelihood, 2001,
    chapter 2). For losses of −1, 0 and 1 it equals `score`.
    """
    offsets = losses - loss
    if abs(distance := float(np.mean(offsets))) < TINY:
        return 0.0
    if distance > 0:
        return -tilted_score(-losses, -loss)
    edge = (TINY - 1) / (1 - loss)  # beyond it, a loss of 1 would have a negative weight

    def excess(tilt: float) -> float:
        return float(np.mean(offsets / (1 + tilt * offsets)))

    tilt = scipy.optimize.brentq(excess, edge, 0) if excess(edge) > 0 else edge
    weights = 1 / (1 + tilt * offsets)
    unseen = max(0.0, 1 - float(np.mean(weights)))
    variance = float(np.mean(weights * offsets**2)) + unseen * (1 - loss) ** 2
    return distance / math.sqrt(variance / len(losses))


def rows_needed(margin: float, level: float, discordant: float = DISCORDANT, power: float = POWER) -> int:
    """Rows that prove a model that loses nothing four times in five: about 6.2 × discordant share ÷ margin² at 5 %."""
    return math.ceil(float(scipy.stats.norm.ppf(1 - level) + scipy.stats.norm.ppf(power)) ** 2 * discordant / margin**2)


def provable_margin(rows: int, level: float, discordant: float = DISCORDANT) -> float:
    """The margin that so many rows prove once in two times, for a model that loses nothing."""
    return float(scipy.stats.norm.ppf(1 - level) * math.sqrt(discordant / rows))


def level_of(opening: int, confidence: float) -> float:
    """The level of the tests at one opening of the proving rows, counted from 1.

    Every opening spends four fifths of the error that is left: 4 %, 0.8 %, 0.16 %, … of the 5 % at 95 % confidence. So
    the error of all openings together stays below 1 − confidence.
    """
    return float((1 - confidence) * FIRST_SHARE * (1 - FIRST_SHARE) ** (opening - 1))
