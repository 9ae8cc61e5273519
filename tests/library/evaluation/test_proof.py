"""The proof against other implementations, published figures and its own promise: the error rate of its verdicts."""

from itertools import pairwise, product

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, multinomial, norm, ttest_1samp

from tailored_llama.evaluation import level_of, noninferiority_test, p_value, provable_margin, rows_needed
from tailored_llama.evaluation.proof import Counts, exact_size, loss_bound, nominal_level, score, tilted_score
from tailored_llama.evaluation.statistics import Answers, Array


def answers(values: list[float], first: int = 0) -> Answers:
    rows = np.arange(first, first + len(values))
    return Answers(rows, np.ones(len(values), dtype=int), np.array(values, dtype=float))


def pair(both: int, only_dense: int, only_small: int, neither: int) -> tuple[Answers, Answers]:
    dense = [1.0] * (both + only_dense) + [0.0] * (only_small + neither)
    small = [1.0] * both + [0.0] * only_dense + [1.0] * only_small + [0.0] * neither
    return answers(dense), answers(small)


def losses(only_dense: int, only_small: int, rows: int) -> Array:
    return np.array([1.0] * only_dense + [-1.0] * only_small + [0.0] * (rows - only_dense - only_small))


def interval(only_dense: int, only_small: int, rows: int, level: float = 0.025) -> tuple[float, float]:
    measured = losses(only_dense, only_small, rows)
    return -loss_bound(-measured, level), loss_bound(measured, level)


def score_by_search(only_dense: int, only_small: int, rows: int, loss: float) -> float:
    """The score statistic, with the likeliest share of `only_small` found numerically."""
    rest = rows - only_dense - only_small

    def surprise(share: float) -> float:
        cells = ((only_dense, share + loss), (only_small, share), (rest, 1 - 2 * share - loss))
        return -sum(count * np.log(max(chance, 1e-300)) for count, chance in cells if count)

    lowest, highest = max(0.0, -loss), (1 - loss) / 2
    share = minimize_scalar(surprise, bounds=(lowest, highest), method="bounded", options={"xatol": 1e-12}).x
    return float((only_dense - only_small - rows * loss) / np.sqrt(rows * (2 * share + loss - loss**2)))


@pytest.mark.parametrize("rows", [20, 150, 1000])
def test_the_score_has_the_likeliest_variance(rows: int) -> None:
    shares = (0.0, 0.02, 0.1, 0.45)
    for b, c, loss in product(shares, shares, (-0.3, -0.03, 0.005, 0.02, 0.05, 0.4)):
        counts = round(b * rows), round(c * rows), rows
        assert score(*counts, loss) == pytest.approx(score_by_search(*counts, loss), abs=2e-3), (*counts, loss)


def test_the_score_is_the_same_from_either_side_and_falls_with_the_loss() -> None:
    for b, c in product((0, 1, 7, 60), (0, 1, 7, 60)):
        scores = [score(b, c, 150, loss) for loss in np.linspace(-0.95, 0.95, 39)]
        assert scores == pytest.approx([-score(c, b, 150, -loss) for loss in np.linspace(-0.95, 0.95, 39)])
        assert all(np.diff(scores) < 0)
    assert score(0, 0, 150, 0.0) == 0
    assert score(9, 4, 150, 0.0) == pytest.approx(5 / 13**0.5)  # McNemar's statistic


@pytest.mark.parametrize(
    ("counts", "level", "published"),
    [
        # Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables, 2017, chapter 8, Table 8.3 (Cavo et
        # al. 2012): 59, 6, 16, 80. The figures are those of the tests of their R package contingencytables.
        ((6, 16, 161), 0.025, (-0.1240, -0.0054)),
        # The same chapter (Bentur et al. 2009): 1, 1, 7, 12. The figures are in the sources of the R package ratesci.
        ((1, 7, 21), 0.025, (-0.517, -0.026)),
        # R's PropCIs::scoreci.mp(25, 28, 618, conf.level = 0.9), which is for (second − first) ÷ rows.
        ((28, 25, 618), 0.05, (-0.0148, 0.0247)),
    ],
)
def test_intervals_are_those_that_are_published(
    counts: tuple[int, int, int], level: float, published: tuple[float, float]
) -> None:
    digits = 3 if counts[2] == 21 else 4
    assert tuple(round(end, digits) for end in interval(*counts, level)) == published


def test_bounds_at_the_edges() -> None:
    assert loss_bound(losses(5, 0, 5), 0.05) == 1
    assert -1 < loss_bound(losses(0, 5, 5), 0.05) < 0
    assert 0 < loss_bound(losses(0, 0, 100), 0.05) < 0.03  # no difference was seen, but one may be
    assert loss_bound(losses(0, 0, 100), 0.05) == pytest.approx(1 / (1 + 100 / norm.ppf(0.05) ** 2))


@pytest.mark.parametrize("level", [0.05, 0.04, 0.008])
@pytest.mark.parametrize("margin", [0.02, 0.03, 0.05])
def test_bound_and_p_say_the_same(level: float, margin: float) -> None:
    for b, c in product(range(0, 40, 5), range(0, 40, 5)):
        found = noninferiority_test(*pair(100, b, c, 200 - b - c), margin, level)
        assert found.proven == (found.p <= found.nominal) == (found.bound < margin), (b, c)
        assert found.counts == Counts(100, b, c, 200 - b - c)
        assert found.loss == pytest.approx((b - c) / 300)


def rejected(rows: int, margin: float, discordant: float, level: float) -> float:
    """How often a model that truly loses the margin is called proven: exact, the sum over all counts."""
    share, lost = (discordant - margin) / 2, (discordant + margin) / 2
    total = 0.0
    for b in range(int(binom.ppf(1e-7, rows, lost)), int(binom.ppf(1 - 1e-7, rows, lost)) + 1):
        left = rows - b
        low, high = 0, left + 1  # find the fewest gains that are proven
        while low < high:
            c = (low + high) // 2
            low, high = (low, c) if norm.cdf(score(b, c, rows, margin)) <= level else (c + 1, high)
        total += binom.pmf(b, rows, lost) * binom.sf(low - 1, left, share / (1 - lost))
    return float(total)


@pytest.mark.parametrize("level", [level_of(1, 0.95), 0.05])
@pytest.mark.parametrize("rows", [150, 300, 1000])
def test_a_model_at_the_margin_is_called_proven_no_more_often_than_the_level(rows: int, level: float) -> None:
    for margin, discordant in product((0.02, 0.03, 0.05), (0.1, 0.2, 0.3)):
        nominal = nominal_level(rows, margin, level)
        assert 0.8 * level < nominal <= level, (margin, discordant)
        assert rejected(rows, margin, discordant, nominal) <= level, (margin, discordant)


def test_a_model_that_only_loses_is_called_proven_no_more_often_than_the_level() -> None:
    """The least favourable case: so few rows differ that counts are no longer normal."""
    level = level_of(1, 0.95)
    for rows, margin in product(range(50, 1001, 190), (0.02, 0.03, 0.05)):
        nominal = nominal_level(rows, margin, level)
        passes = [b for b in range(60) if norm.cdf(score(b, 0, rows, margin)) <= nominal]
        assert sum(binom.pmf(b, rows, margin) for b in passes) <= level, (rows, margin)


@pytest.mark.parametrize(("rows", "margin"), [(2, 0.03), (30, 0.03), (30, 0.4), (60, 0.1)])
def test_the_size_is_that_of_all_counts_together(rows: int, margin: float) -> None:
    b, c = np.array([(b, c) for b in range(rows + 1) for c in range(rows + 1 - b)]).T
    scores = np.array([score(*counts, rows, margin) for counts in zip(b.tolist(), c.tolist(), strict=True)])
    shares = np.sin(np.linspace(0, np.pi / 2, 1000)) ** 2 * (1 - margin) / 2
    for level in (0.05, 0.04, 0.008):
        passes = norm.cdf(scores) <= level
        chances = [
            multinomial.pmf(
                np.stack([b, c, rows - b - c], 1)[passes], rows, [share + margin, share, 1 - margin - 2 * share]
            )
            for share in shares
        ]
        assert exact_size(rows, margin, level) == pytest.approx(max(map(np.sum, chances)), rel=1e-3), level


def test_the_size_is_that_of_the_worst_share() -> None:
    """With two rows, a model passes that loses none and gains one or both: in 1.2q − 3q² of cases."""
    assert exact_size(2, 0.4, 0.05) == pytest.approx(1.2 * 0.2 - 3 * 0.2**2, rel=1e-6)


def test_the_level_is_lowered_where_the_test_would_err_more_often() -> None:
    assert exact_size(100, 0.03, 0.04) == pytest.approx(0.97**100)  # the chance that no row of 100 is lost
    assert exact_size(100, 0.03, nominal_level(100, 0.03, 0.04)) <= 0.04
    found = noninferiority_test(*pair(60, 0, 0, 40), 0.03, 0.04)
    assert found.p < found.level  # which would prove it
    assert (found.proven, found.bound > 0.03) == (False, True)
    assert noninferiority_test(*pair(63, 0, 0, 50), 0.03, 0.04).proven
    sizes = [exact_size(150, 0.03, level) for level in (0.005, 0.01, 0.02, 0.04, 0.05)]
    assert all(np.diff(sizes) > 0)


@pytest.mark.parametrize("rows", [20, 150, 1000])
def test_the_score_of_values_is_that_of_counts(rows: int) -> None:
    for b, c, loss in product((0.0, 0.05, 0.3), (0.0, 0.05, 0.3), (-0.2, -0.03, 0.005, 0.03, 0.3)):
        lost, gained = round(b * rows), round(c * rows)
        assert tilted_score(losses(lost, gained, rows), loss) == pytest.approx(
            score(lost, gained, rows, loss), abs=1e-4
        ), (b, c, loss)


def test_probabilities_are_compared_much_as_by_a_t_test_where_losses_are_even() -> None:
    generator = np.random.default_rng(0)
    dense = generator.beta(4, 2, 1000)
    small = np.clip(dense - 0.01 + generator.normal(0, 0.3, 1000), 0, 1)
    found = noninferiority_test(answers(list(dense)), answers(list(small)), 0.03, 0.05)
    assert found.p == pytest.approx(ttest_1samp(dense - small, 0.03, alternative="less").pvalue, abs=0.005)
    assert found.counts is None
    assert found.proven == (found.bound < 0.03)
    assert p_value(dense - small, found.bound) == pytest.approx(0.05)


def test_a_model_that_loses_much_on_few_rows_is_called_proven_no_more_often_than_the_level() -> None:
    """As F1 of a model in fewer bits: a t-test at 5 % calls it proven in 11 % of the draws."""
    generator = np.random.default_rng(0)
    lost = np.zeros(5000)
    lost[:200] = generator.choice([1, 0.67, 0.5, 0.33], 200, p=[0.4, 0.2, 0.2, 0.2])
    draws = [lost[generator.integers(0, 5000, 150)] for _ in range(2000)]
    margin = float(lost.mean())
    assert np.mean([ttest_1samp(own, margin, alternative="less").pvalue <= 0.05 for own in draws]) > 0.08
    assert np.mean([p_value(own, margin) <= 0.05 for own in draws]) < 0.06


@pytest.mark.parametrize("seed", range(6))
def test_of_any_values_bound_and_p_say_the_same(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = int(generator.integers(2, 300))
    for lost in (
        generator.uniform(-1, 1, rows),
        generator.normal(0, 0.01, rows),
        np.where(generator.random(rows) < 0.03, generator.uniform(0, 1, rows), 0.001),
        np.full(rows, generator.uniform(-1, 1)),
    ):
        dense, small = answers(list(np.maximum(lost, 0))), answers(list(np.maximum(-lost, 0)))
        found = [noninferiority_test(dense, small, margin, 0.04) for margin in (0.001, 0.02, 0.1, 0.5)]
        assert all(test.proven == (test.bound < test.margin) for test in found)
        assert all(np.diff([test.p for test in found]) <= 1e-9)


def test_values_that_never_differ_prove_nothing_on_few_rows() -> None:
    same = answers([0.5, 0.5, 0.7])
    assert not noninferiority_test(same, same, 0.03, 0.05).proven
    assert noninferiority_test(answers([0.5] * 200), answers([0.5] * 200), 0.03, 0.05).proven


def test_a_loss_that_is_the_same_on_every_row_is_not_certain() -> None:
    assert 0.001 < p_value(np.full(10, 0.25), 0.5) < 0.05
    assert p_value(np.full(10, 0.25), 0.25) == 0.5
    assert p_value(np.full(10, 0.25), 0.1) > 0.5
    assert noninferiority_test(answers([0.99] * 9), answers([0.0] * 9), 0.03, 0.05).bound == pytest.approx(1, abs=0.01)


def test_other_examples_and_single_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="3 examples against 2"):
        noninferiority_test(answers([1, 0, 1]), answers([1, 0]), 0.03, 0.05)
    with pytest.raises(ValueError, match="row 0: example 0 against 5"):
        noninferiority_test(answers([1, 0]), answers([1, 0], first=5), 0.03, 0.05)
    with pytest.raises(ValueError, match=r"^1 rows; a test needs two$"):
        noninferiority_test(answers([1]), answers([1]), 0.03, 0.05)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_the_levels_of_all_openings_stay_within_the_error(confidence: float) -> None:
    levels = [level_of(opening, confidence) for opening in range(1, 200)]
    assert sum(levels) <= (1 - confidence) * (1 + 1e-12)
    assert all(0 < later < level for level, later in pairwise(levels))
    assert levels[0] == pytest.approx(0.8 * (1 - confidence))


def test_rows_that_are_asked_for_are_enough_four_times_in_five() -> None:
    """And the provable margin is proven once in two times; both for a model that differs on 15 % and loses nothing."""
    generator = np.random.default_rng(0)

    def proven(rows: int, margin: float) -> float:
        draws = generator.multinomial(rows, [0.075, 0.075, 0.85], 2000)
        return float(np.mean([norm.cdf(score(b, c, rows, margin)) <= 0.05 for b, c, _ in draws.tolist()]))

    for margin in (0.02, 0.03, 0.05):
        assert proven(rows_needed(margin, 0.05), margin) == pytest.approx(0.8, abs=0.05)
    for rows in (300, 1000):
        assert proven(rows, provable_margin(rows, 0.05)) == pytest.approx(0.5, abs=0.06)
