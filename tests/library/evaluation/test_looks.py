"""Proofs from few labels: the same figures as with all of them, and the error that their level says."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from tailored_llama.evaluation import (
    LOOKS,
    Said,
    compare_said,
    exact_size,
    expected_labels,
    expected_loss,
    look_levels,
    noninferiority_test,
    plan_looks,
    rows_to_prove,
    test_at_looks,
)
from tailored_llama.evaluation.statistics import Answers, Array

test_at_looks.__test__ = False  # type: ignore[attr-defined]
MARGIN, LEVEL, ROWS = 0.05, 0.04, 600
PLANNED = plan_looks(ROWS, MARGIN, LEVEL)


def said(answers: Array) -> Said:
    return Said(np.arange(len(answers)), answers.astype(object))


def drawn(rows: int, differing: float, seed: int = 0, lost: float = 0.5) -> tuple[Array, Array, Array]:
    """Answers of two models that differ on a share of the rows, and right answers; the small one loses `lost`."""
    generator = np.random.default_rng(seed)
    right = generator.choice([*"abc"], rows)
    dense = np.where(generator.random(rows) < 0.7, right, "x")
    differ = generator.random(rows) < differing
    gains = generator.random(rows) >= lost
    dense = np.where(differ & ~gains, right, np.where(differ & gains, "y", dense))
    small = np.where(differ, np.where(gains, right, "z"), dense)
    return dense, small, right


def values(answers: Array, right: Array) -> Answers:
    return Answers(np.arange(len(right)), right, (answers == right).astype(float))


def test_labels_of_differing_rows_alone_give_the_figures_of_all_labels() -> None:
    dense, small, right = drawn(800, 0.1)
    whole = noninferiority_test(values(dense, right), values(small, right), 0.05, 0.04)
    labels = {i: right[i] for i in range(800) if dense[i] != small[i]}
    compared = compare_said(said(dense), said(small), labels)
    test = noninferiority_test(compared.dense, compared.small, 0.05, 0.04)
    assert len(labels) < 110
    assert (test.loss, test.p, test.bound) == pytest.approx((whole.loss, whole.p, whole.bound), rel=1e-12)
    assert not compared.missing.any()


def test_a_missing_label_counts_as_lost() -> None:
    dense, small, right = drawn(300, 0.1)
    differing = [i for i in range(300) if dense[i] != small[i]]
    some = {i: right[i] for i in differing[:10]}
    compared = compare_said(said(dense), said(small), some)
    assert np.flatnonzero(compared.missing).tolist() == differing[10:]
    assert np.all(compared.dense.values[compared.missing] == 1)
    assert np.all(compared.small.values[compared.missing] == 0)


def test_other_rows_are_refused() -> None:
    first = said(np.array(["a", "b"]))
    with pytest.raises(ValueError, match="row 1: example 1 against 5"):
        compare_said(first, Said(np.array([0, 5]), first.answers), {})


@pytest.mark.parametrize("level", [0.04, 0.008])
def test_the_looks_together_err_as_often_as_the_level_says(level: float) -> None:
    levels = look_levels(level)
    shares = np.arange(1, LOOKS + 1) / LOOKS
    together = np.sqrt(np.minimum.outer(shares, shares) / np.maximum.outer(shares, shares))
    passed = 1 - multivariate_normal(cov=together, abseps=1e-7, maxpts=5_000_000).cdf(norm.isf(levels))
    assert passed == pytest.approx(level, rel=0.001)
    assert list(levels) == sorted(levels)
    constants = norm.isf(levels) * shares**0.25  # Wang and Tsiatis, with Δ = 0.25
    assert constants == pytest.approx(constants[0], rel=1e-6)


def test_no_look_errs_more_often_than_its_level() -> None:
    assert [look.rows for look in PLANNED] == [120, 240, 360, 480, 600]
    for look, level in zip(PLANNED, look_levels(LEVEL), strict=True):
        assert exact_size(look.rows, MARGIN, look.level) <= level * 1.0001


def test_a_model_that_loses_the_margin_is_seldom_proven() -> None:
    proven = 0
    for seed in range(150):
        dense, small, right = drawn(ROWS, 0.1, seed, lost=0.75)  # a true loss of 5 points
        labels = {i: right[i] for i in range(ROWS) if dense[i] != small[i]}
        proven += test_at_looks(compare_said(said(dense), said(small), labels), PLANNED, MARGIN, LEVEL)[0].proven
    assert proven <= 14  # of 150, which 4 % exceed once in 1,000 times


def test_a_model_that_hardly_differs_is_proven_without_a_label() -> None:
    dense, small, _ = drawn(ROWS, 0.01)
    test, waits = test_at_looks(compare_said(said(dense), said(small), {}), PLANNED, MARGIN, LEVEL)
    assert (test.proven, waits, test.labels) == (True, False, 0)
    assert 0 < test.missing < 12


def test_labels_are_asked_for_until_they_decide() -> None:
    dense, small, right = drawn(ROWS, 0.08)
    labels: dict[int, str] = {}
    for _ in range(LOOKS + 1):
        compared = compare_said(said(dense), said(small), labels)
        test, waits = test_at_looks(compared, PLANNED, MARGIN, LEVEL)
        if not waits:
            break
        labels |= {int(i): right[i] for i in np.flatnonzero(compared.missing[: test.rows])}
    assert test.proven
    assert len(labels) < np.sum(dense != small)  # it ended before the last look
    assert test.labels == len(labels)


def test_a_hopeless_model_is_given_up_early() -> None:
    dense, small, right = drawn(ROWS, 0.2, lost=0.9)  # it loses 16 points
    labels = {i: right[i] for i in range(240) if dense[i] != small[i]}
    test, waits = test_at_looks(compare_said(said(dense), said(small), labels), PLANNED, MARGIN, LEVEL)
    assert (test.proven, waits) == (False, False)
    assert test.rows <= 240


def test_the_planned_rows_have_the_power_that_they_were_planned_for() -> None:
    assert rows_to_prove(MARGIN, LEVEL, 0.12, 0.8) == pytest.approx(ROWS, rel=0.06)
    proven, labels = 0, []
    for seed in range(100):
        dense, small, right = drawn(ROWS, 0.12, seed, lost=0.55)  # a true loss of 1.2 points, a quarter of the margin
        known = {i: right[i] for i in range(ROWS) if dense[i] != small[i]}
        test, _ = test_at_looks(compare_said(said(dense), said(small), known), PLANNED, MARGIN, LEVEL)
        proven += test.proven
        labels.append(test.labels)
    assert 68 <= proven <= 92
    average, most = expected_labels(ROWS, MARGIN, LEVEL, 0.12)
    assert max(labels) <= 1.4 * most
    assert average < np.mean(labels) < most  # the average is that of a model that loses nothing


def test_rows_without_a_label_count_as_lost_as_often_as_those_that_differ() -> None:
    rows = np.arange(1000)
    differs, unknown = rows < 200, (rows >= 60) & (rows < 200)
    lost = np.where(rows < 60, rows % 2, np.where(unknown, 1.0, 0.0))  # half of the labelled ones are lost
    assert expected_loss(lost, differs, unknown) == pytest.approx(0.1, abs=0.01)
    assert expected_loss(lost[:60], differs[:60], unknown[:60]) == lost[:60].mean()  # nothing has to be guessed


def test_before_any_label_a_model_that_differs_more_is_expected_to_lose_more() -> None:
    everywhere, none = np.ones(100, dtype=bool), np.zeros(100, dtype=bool)
    few = np.arange(100) < 5
    expected = [expected_loss(own.astype(float), own, own) for own in (none, few, everywhere)]
    assert expected == sorted(expected)
    assert expected[0] == 0
    assert expected[2] < 0.5
