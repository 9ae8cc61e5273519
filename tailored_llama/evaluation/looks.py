"""Proofs from few labels: only rows that two models answer differently need one, and planned looks may end early.

A row that both models answer alike adds nothing to the loss, whatever its label is. So the test on all rows needs the
labels of the others alone.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy

from tailored_llama.evaluation.proof import Look, LossTest, nominal_level, noninferiority_test, rows_needed, score
from tailored_llama.evaluation.scores import Said
from tailored_llama.evaluation.statistics import Answers, Array, check_same_examples

LOOKS = 5  # equally spaced; more save few labels
SHAPE = 0.25  # of the boundary: between Pocock's (0.5) and O'Brien and Fleming's (0)
FUTILE = 0.1  # conditional power, below which no more labels are asked for
PLANNED_LOSS = 0.25  # of the margin: what the planned rows allow a model to lose
PRIOR_ROWS, PRIOR_LOST = 8, 0.15  # rows that differ, and the share of them that is lost, before any has a label
SECONDS_A_LABEL = 12  # that a person takes, roughly
LONGER = 1.1  # rows at the last look, beside those of one test of the same power
_STEP, _REACH = 0.02, 12.0  # of the grid on which the boundary is computed, in standard deviations


@dataclass(frozen=True)
class Compared:
    """Two models on the same rows; on those to prove on, in the order in which labels are asked for.

    `missing` tells the rows that they answer differently and that have no label yet, bool [rows]. Such a row counts as
    lost. A row that both answer alike counts as right for both.
    """

    dense: Answers
    small: Answers
    missing: Array


def compare_said(dense: Said, small: Said, labels: Mapping[int, str]) -> Compared:
    """Compare what two models answered to the same rows; `labels` are by example, in the same normal form.

    Raises:
        ValueError: they answered other rows.
    """
    right = np.array([labels.get(int(example)) for example in dense.examples], dtype=object)
    before = Answers(dense.examples, right, np.ones(len(right)))
    check_same_examples(before, Answers(small.examples, right, before.values))
    alike, known = dense.answers == small.answers, np.array([label is not None for label in right])
    missing = ~alike & ~known
    return Compared(
        replace(before, values=(alike | missing | (dense.answers == right)).astype(float)),
        replace(before, values=(alike | (known & (small.answers == right))).astype(float)),
        missing,
    )


def expected_loss(lost: Array, differs: Array, unknown: Array) -> float:
    """The loss of a model, a share, where some rows that it answers differently have no label: [rows] each.

    The share of differing rows that are lost is taken from those with a label. As few of these tell little,
    `PRIOR_ROWS` made-up rows are counted with them, of which the share `PRIOR_LOST` is lost.
    """
    seen = lost[differs & ~unknown]
    rate = (np.sum(seen) + PRIOR_ROWS * PRIOR_LOST) / (len(seen) + PRIOR_ROWS)
    return float((np.sum(lost[~unknown]) + rate * np.sum(unknown)) / len(lost))


def plan_looks(rows: int, margin: float, level: float) -> tuple[Look, ...]:
    """The looks at so many rows, each with the level that its test has there.

    Each level is lowered where the exact size of the test on so many rows would be above it.
    """
    stops = look_rows(rows)
    levels = look_levels(level)[-len(stops) :]
    return tuple(Look(stop, nominal_level(stop, margin, own)) for stop, own in zip(stops, levels, strict=True))


def look_rows(rows: int) -> tuple[int, ...]:
    """After how many of so many rows each look is."""
    return tuple(sorted({max(2, math.ceil(rows * number / LOOKS)) for number in range(1, LOOKS + 1)}))


@functools.cache
def look_levels(level: float) -> tuple[float, ...]:
    """The nominal levels of the looks whose tests together err with the probability `level`.

    The boundary is that of Wang and Tsiatis (Biometrics 43, 1987, p. 193): at the share t of the rows, the statistic
    has to reach C·t^(SHAPE − 1/2). C is found by recursive integration (Armitage, McPherson and Rowe, Journal of the
    Royal Statistical Society A 132, 1969, p. 235).
    """
    constant = scipy.optimize.brentq(lambda c: float(np.sum(_crossings(_bounds(c), 0))) - level, 0.1, 8, xtol=1e-6)
    return tuple(map(float, scipy.stats.norm.sf(_bounds(constant))))


def _bounds(constant: float) -> Array:
    return np.asarray(constant * (np.arange(1, LOOKS + 1) / LOOKS) ** (SHAPE - 0.5))


def _crossings(bounds: Array, drift: float) -> Array:
    """The probability that the statistic first crosses its bound at each look; `drift` is its mean at the last one."""
    grid, crossed = np.arange(-_REACH, _REACH + _STEP / 2, _STEP), []
    step = scipy.stats.norm.pdf(grid, drift / math.sqrt(len(bounds))) * _STEP
    density = step  # of the sum of the steps so far
    for number, bound in enumerate(bounds, 1):
        above = np.clip((grid - bound * math.sqrt(number)) / _STEP + 0.5, 0, 1)
        crossed.append(float(np.sum(density * above)))
        density = np.convolve(density * (1 - above), step, mode="same")
    return np.array(crossed)


def rows_at_looks(margin: float, level: float, differing: float, power: float) -> int:
    """Rows that prove a model by planned looks, if it answers a share of them differently and loses a little.

    It may lose `PLANNED_LOSS` of the margin.
    """
    return math.ceil(LONGER * rows_needed((1 - PLANNED_LOSS) * margin, level, differing, power))


def rows_to_prove(margin: float, level: float, differing: float, power: float) -> int:
    """As `rows_at_looks`, and enough rows to prove a model that answers all of them alike. This may take seconds."""
    rows, last = float(rows_at_looks(margin, level, differing, power)), look_levels(level)[-1]
    while (p := scipy.stats.norm.cdf(score(0, 0, math.ceil(rows), margin))) > last / 4 and (
        p > nominal_level(math.ceil(rows), margin, last)  # which takes seconds, and is hardly ever below a quarter
    ):
        rows *= LONGER
    return math.ceil(rows)


def expected_labels(rows: int, margin: float, level: float, differing: float) -> tuple[int, int]:
    """The labels that a proof by planned looks takes, on average and at most, if the model loses nothing."""
    bounds = np.asarray(scipy.stats.norm.isf(look_levels(level)))
    crossed = _crossings(bounds, margin * math.sqrt(rows / max(differing, 1 / rows)))
    left = 1 - np.cumsum(crossed)[:-1]  # the share of proofs that go on after each look
    most = rows * differing
    return math.ceil(most * (1 + float(np.sum(left))) / LOOKS), math.ceil(most)


def test_at_looks(compared: Compared, looks: Sequence[Look], margin: float, level: float) -> tuple[LossTest, bool]:
    """Test a model at the planned looks; also whether further labels may still prove it.

    It is proven as soon as the test at any look passes, with missing labels counted as lost: with them, it passes all
    the more. It is given up where all labels are there, and a model that loses nothing would hardly pass any more
    (`FUTILE`); that makes no error larger.

    Raises:
        ValueError: as `noninferiority_test`.
    """
    tests = [_test_at(compared, look, looks, margin, level) for look in looks]
    for test in tests:
        if test.proven:
            return test, False
    for test in tests:
        if test.missing or _conditional_power(test) < FUTILE:
            return test, test.missing > 0
    return tests[-1], False


def _test_at(compared: Compared, look: Look, looks: Sequence[Look], margin: float, level: float) -> LossTest:
    dense, small = (own.take(slice(look.rows)) for own in (compared.dense, compared.small))
    test = noninferiority_test(dense, small, margin, level, look.level)
    return replace(test, looks=tuple(looks), missing=int(np.sum(compared.missing[: look.rows])))


def _conditional_power(test: LossTest) -> float:
    """How often a model that loses nothing is proven at the last look, given the test at an earlier one."""
    last, counts = test.looks[-1], test.counts
    if (share := test.rows / last.rows) == 1 or counts is None:
        return 1.0
    lost, gained = counts.only_dense, counts.only_small
    drift = test.margin * last.rows / math.sqrt(last.rows * max(lost + gained, 1) / test.rows)
    reached = -score(lost, gained, test.rows, test.margin) * math.sqrt(share) + drift * (1 - share)
    missing = scipy.stats.norm.isf(last.level) - reached
    return float(scipy.stats.norm.sf(missing / math.sqrt(1 - share)))
