"""The report's statistics against values worked out by hand."""

import math

import numpy as np
import pytest

from tailored_llama.evaluation.statistics import (
    Answers,
    Estimate,
    above_floor,
    chance_corrected,
    check_same_examples,
    detectable_difference,
    interval,
    mean_of,
    paired_draws,
    ratios,
)


def paired_interval(tailored: Answers, dense: Answers, floor: float = 0.0, seed: int = 0) -> tuple[float, float]:
    """What the report does for one benchmark: draw both models' answers together, take the 95 % interval."""
    return interval(ratios(*paired_draws(tailored, dense, seed), floor))


def answers(right: list[float], first: int = 0) -> Answers:
    return Answers(np.arange(first, first + len(right)), np.ones(len(right), dtype=int), np.array(right, dtype=float))


def test_chance_corrected_counts_only_what_is_above_the_floor() -> None:
    assert chance_corrected(0.55, 0.75, 0.5) == pytest.approx(0.2)
    assert chance_corrected(0.45, 0.75, 0.5) == pytest.approx(-0.2)
    assert math.isnan(chance_corrected(0.6, 0.5, 0.5))
    assert math.isnan(chance_corrected(0.6, 0.4, 0.5))


def test_above_floor_takes_the_whole_interval() -> None:
    assert above_floor(0.60, 0.02, 0.5)
    assert not above_floor(0.539, 0.02, 0.5)  # 0.539 − 0.0392 < 0.5
    assert above_floor(0.5393, 0.02, 0.5)
    assert not above_floor(0.42, 0.02, 0.62)


def test_draws_have_the_moments_of_the_paired_bootstrap() -> None:
    # 40 both right, 30 dense only, 10 tailored only, 20 neither.
    dense = answers([1] * 40 + [1] * 30 + [0] * 10 + [0] * 20)
    tailored = answers([1] * 40 + [0] * 30 + [1] * 10 + [0] * 20)
    drawn_tailored, drawn_dense = paired_draws(tailored, dense, seed=1, resamples=200_000)
    assert drawn_dense.mean() == pytest.approx(0.7, abs=1e-3)
    assert drawn_tailored.mean() == pytest.approx(0.5, abs=1e-3)
    assert drawn_dense.var() == pytest.approx(0.7 * 0.3 / 100, rel=0.02)
    covariance = np.mean((drawn_dense - 0.7) * (drawn_tailored - 0.5))
    assert covariance == pytest.approx((0.4 - 0.7 * 0.5) / 100, rel=0.1)


def test_draws_of_values_between_0_and_1() -> None:
    """F1: 25 examples each of four pairs of values."""
    one, other = answers([0.5, 1.0, 0.25, 0.0] * 25), answers([0.5, 0.5, 1.0, 0.0] * 25)
    drawn_one, drawn_other = paired_draws(one, other, seed=1, resamples=200_000)
    assert drawn_one.mean() == pytest.approx(0.4375, abs=1e-3)
    assert drawn_other.mean() == pytest.approx(0.5, abs=1e-3)
    assert np.var(drawn_one - drawn_other) == pytest.approx(np.var(one.values - other.values) / 100, rel=0.02)


def test_the_same_answers_recover_everything_exactly() -> None:
    same = answers([1, 0, 1, 1, 0, 1, 0, 1] * 10)
    assert paired_interval(same, same) == (1.0, 1.0)
    assert paired_interval(same, same, floor=0.25) == (1.0, 1.0)


def test_interval_is_seeded_and_narrower_than_an_unpaired_one() -> None:
    generator = np.random.default_rng(0)
    dense = generator.random(400) < 0.6
    tailored = dense & (generator.random(400) < 0.9)
    pair = answers(tailored.tolist()), answers(dense.tolist())
    low, high = paired_interval(*pair, seed=3)
    assert (low, high) == paired_interval(*pair, seed=3)
    assert low < tailored.mean() / dense.mean() < high
    one, other = paired_draws(*pair, seed=1)[0], paired_draws(*pair, seed=2)[1]
    unpaired = interval(ratios(one, other))
    assert high - low < unpaired[1] - unpaired[0]


@pytest.mark.parametrize("examples", [60, 400, 4000])
def test_a_detectable_difference_is_where_the_interval_of_paired_answers_leaves_0(examples: int) -> None:
    discordant = round(0.15 * examples)

    def interval_of(difference: float) -> tuple[float, float]:
        """Of two models that disagree on so many examples, and one is better by `difference`."""
        ahead = round((discordant + difference * examples) / 2)
        one = answers([1] * ahead + [0] * (examples - ahead))
        other = answers([0] * ahead + [1] * (discordant - ahead) + [0] * (examples - discordant))
        return interval(np.subtract(*paired_draws(one, other, resamples=20_000)))

    smallest = detectable_difference(examples)
    assert interval_of(1.25 * smallest)[0] > 0
    assert interval_of(0.75 * smallest)[0] < 0


def test_interval_takes_order_statistics() -> None:
    values = np.arange(1.0, 1001.0)
    assert interval(values) == (26.0, 975.0)
    assert interval(np.append(values, np.nan)) == (26.0, 975.0)
    assert all(map(math.isnan, interval(np.array([np.nan]))))


def test_dense_without_a_right_answer_has_no_interval_and_no_warning() -> None:
    with np.errstate(all="raise"):
        assert all(map(math.isnan, paired_interval(answers([0] * 5), answers([0] * 5))))
        assert paired_interval(answers([1] * 5), answers([0] * 5)) == (math.inf, math.inf)


def test_a_resample_at_the_floor_leaves_the_interval_open() -> None:
    found = ratios(np.array([0.7, 0.4, 0.5, 0.6]), np.array([0.75, 0.5, 0.5, 0.4]), floor=0.5)
    assert found[0] == pytest.approx(0.8)
    assert found[1] == -math.inf
    assert math.isnan(found[2])
    assert found[3] == math.inf
    rounded = ratios(np.array([0.4, 0.1 + 0.2]), np.array([0.1 + 0.2, 0.1 + 0.2]), floor=0.3)  # 0.1 + 0.2 > 0.3
    assert rounded[0] == math.inf
    assert math.isnan(rounded[1])


def test_a_mean_of_unbounded_ratios_leaves_out_what_is_not_defined() -> None:
    with np.errstate(all="raise"):
        mean = mean_of([Estimate(1.0, np.array([np.inf, 0.5])), Estimate(0.5, np.array([-np.inf, 0.7]))])
    assert mean.value == 0.75
    assert math.isnan(mean.draws[0])
    assert interval(mean.draws) == pytest.approx((0.6, 0.6))


def test_other_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 examples against 2"):
        paired_interval(answers([1, 0, 1]), answers([1, 0]))
    with pytest.raises(ValueError, match="row 0: example 5 against 0"):
        paired_interval(answers([1, 0], first=5), answers([1, 0]))
    other = Answers(np.arange(2), np.array([1, 0]), np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="row 1: answer 1 against 0"):
        check_same_examples(answers([1, 0]), other)
    with pytest.raises(ValueError, match="0 examples"):
        paired_draws(answers([]), answers([]))
