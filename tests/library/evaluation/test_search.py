"""The search on ladders of known losses: it finds the last rung within the margin, and does not measure all."""

from collections.abc import Sequence

import numpy as np
import pytest

from tailored_llama.evaluation import Ladder, Measured, Rung, nearest, search, sequence
from tailored_llama.evaluation.ladders import AT_ONCE, MOST_TESTS, next_positions, smooth, smooth_all

Losses = Sequence[Sequence[float]]


class Ruler:
    """Measures rungs by looking up their losses, and remembers which."""

    def __init__(self, ladders: Sequence[Ladder], losses: Losses) -> None:
        self.ladders, self.losses = ladders, losses
        self.calls: list[list[Rung]] = []

    def __call__(self, rungs: Sequence[Rung]) -> list[Measured]:
        self.calls.append(list(rungs))
        return [Measured(r, self.ladders[r.ladder].costs[r.position], self.losses[r.ladder][r.position]) for r in rungs]

    @property
    def rungs(self) -> list[Rung]:
        return [rung for call in self.calls for rung in call]


def run(costs: Losses, losses: Losses, margin: float) -> tuple[dict[Rung, Measured], Ruler]:
    ladders = [Ladder(tuple(own)) for number, own in enumerate(costs)]
    ruler = Ruler(ladders, losses)
    return search(ladders, ruler, margin), ruler


def evenly(rungs: int, whole: float = 100.0) -> list[float]:
    return [whole - 10 * place for place in range(rungs)]


def last_within(losses: Sequence[float], margin: float) -> int | None:
    return max((place for place, loss in enumerate(losses) if loss <= margin), default=None)


@pytest.mark.parametrize("seed", range(50))
def test_without_noise_it_finds_the_last_rung_of_a_ladder_within_the_margin(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rungs = int(generator.integers(1, 31))
    losses = np.sort(generator.uniform(-0.02, 0.15, rungs)).tolist()
    found, ruler = run([np.linspace(100, 10, rungs).tolist()], [losses], 0.03)
    passing = [rung.position for rung, one in found.items() if one.smoothed <= 0.03]
    assert max(passing, default=None) == last_within(losses, 0.03)
    assert len(ruler.rungs) == len(set(ruler.rungs))  # none is measured twice
    assert all(len(call) <= AT_ONCE for call in ruler.calls)
    if rungs > 6:
        assert len(ruler.rungs) < rungs
    assert len(ruler.calls) <= 3 + np.emath.logn(AT_ONCE + 1, rungs)  # each look leaves about a third


@pytest.mark.parametrize("seed", range(50))
def test_of_several_ladders_it_finds_the_smallest_candidate_of_all(seed: int) -> None:
    generator = np.random.default_rng(seed)
    costs = [np.sort(generator.uniform(1, 100, 8))[::-1].tolist() for _ in range(3)]
    losses = [np.sort(generator.uniform(-0.02, 0.1, 8)).tolist() for _ in range(3)]
    found, ruler = run(costs, losses, 0.03)
    lasts = [last_within(own, 0.03) for own in losses]
    smallest = min((costs[at][last] for at, last in enumerate(lasts) if last is not None), default=None)
    tests = sequence(found, 0.03)
    assert (tests[-1].cost if tests else None) == smallest
    best = np.inf
    for number, (own, last) in enumerate(zip(costs, lasts, strict=True)):  # nothing was measured that cannot win
        visited = [rung.position for rung in ruler.rungs if rung.ladder == number]
        assert visited[0] == 0
        assert all(own[place] < best or place + 1 in visited for place in visited[1:])  # or that is a safer one
        best = min(best, own[last] if last is not None else np.inf)


@pytest.mark.parametrize(("loss", "visited"), [(0.02, [0, 2, 3, 1]), (0.014, [0, 2, 3])])
def test_beside_what_may_not_be_proven_what_loses_less_is_known(loss: float, visited: list[int]) -> None:
    _, ruler = run([evenly(4)], [[0.0, 0.001, loss, 0.1]], 0.03)
    assert [rung.position for rung in ruler.rungs] == visited


def test_a_ladder_whose_whole_model_loses_too_much_is_left() -> None:
    found, ruler = run([evenly(8), evenly(8, 95)], [[0.04] * 8, [0.0, 0.01, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3]], 0.03)
    assert [rung for rung in ruler.rungs if rung.ladder == 0] == [Rung(0, 0)]
    assert sequence(found, 0.03)[-1].rung == Rung(1, 3)


def test_where_nothing_passes_nothing_is_tested_and_the_nearest_is_named() -> None:
    found, ruler = run([evenly(8), evenly(8, 95)], [[0.05] * 8, [0.04] * 8], 0.03)
    assert ruler.rungs == [Rung(0, 0), Rung(1, 0)]
    assert sequence(found, 0.03) == []
    assert nearest(found).rung == Rung(1, 0)


def test_a_ladder_that_cannot_be_smaller_is_passed_over_but_for_its_whole_model() -> None:
    _, ruler = run([[50, 40, 30], [90, 80, 70, 60, 31]], [[0.0] * 3, [0.0] * 5], 0.03)
    assert [rung for rung in ruler.rungs if rung.ladder == 1] == [Rung(1, 0)]


def test_the_whole_model_of_the_reference_ladder_is_no_candidate() -> None:
    ladders = [Ladder((50, 40)), Ladder((90, 80, 70, 45), reference=True)]
    rungs: list[Rung] = []

    def measure(wanted: Sequence[Rung]) -> list[Measured]:
        rungs.extend(wanted)
        return [Measured(rung, ladders[rung.ladder].costs[rung.position], 0.02) for rung in wanted]

    found = search(ladders, measure, 0.03)
    assert rungs == [Rung(0, 0), Rung(0, 1)]  # nothing of the second can be smaller
    assert Rung(1, 0) not in {one.rung for one in sequence(found, 0.03)}


def test_a_whole_model_is_tested_before_a_pruned_one_that_measured_alike() -> None:
    found, _ = run([[90, 80, 70, 60]], [[0.02, 0.02, 0.02, 0.1]], 0.03)
    assert [one.rung.position for one in sequence(found, 0.03)] == [0, 2]


def test_what_loses_too_much_in_more_bits_is_not_tried_in_fewer() -> None:
    ladders = [Ladder((80, 70, 60, 50, 40)), Ladder((45, 40, 35, 30, 25), above=0)]
    losses = [[0.0, 0.01, 0.02, 0.1, 0.2], [0.0, 0.02, 0.04, 0.1, 0.2]]
    rungs: list[Rung] = []

    def measure(wanted: Sequence[Rung]) -> list[Measured]:
        rungs.extend(wanted)
        return [
            Measured(rung, ladders[rung.ladder].costs[rung.position], losses[rung.ladder][rung.position])
            for rung in wanted
        ]

    found = search(ladders, measure, 0.03)
    assert {rung.position for rung in rungs if rung.ladder == 1} == {0, 1, 2}
    assert sequence(found, 0.03)[-1].rung == Rung(1, 1)

    losses[0] = [0.1] * 5  # not even the whole model
    rungs.clear()
    search(ladders, measure, 0.03)
    assert rungs == [Rung(0, 0)]


def test_what_measures_better_in_fewer_bits_is_tested_after_the_same_in_more() -> None:
    """As it was met with 160 rows to choose with: q4_0 measured 0.0 lost, q8_0 1.3; truly they lose 5 and 1."""
    ladders = [Ladder((145.0,)), Ladder((105.0,), above=0), Ladder((92.0,), above=1)]
    losses = [0.013, 0.05, 0.0]

    def measure(wanted: Sequence[Rung]) -> list[Measured]:
        return [Measured(rung, ladders[rung.ladder].costs[0], losses[rung.ladder]) for rung in wanted]

    found = search(ladders, measure, 0.05)
    assert [one.rung.ladder for one in sequence(found, 0.05)] == [0, 2]
    assert [one.smoothed for one in found.values()] == pytest.approx([0.013, 0.025, 0.025])


def test_smoothing_falls_neither_along_a_ladder_nor_towards_fewer_bits() -> None:
    ladders = [Ladder((3.0, 2.0)), Ladder((2.0, 1.0), above=0), Ladder((9.0, 8.0))]
    losses = {(0, 0): 0.01, (0, 1): 0.03, (1, 0): 0.0, (1, 1): 0.02, (2, 0): 0.5, (2, 1): 0.4}
    measured = {Rung(*at): Measured(Rung(*at), 1.0, loss) for at, loss in losses.items()}
    smoothed = {(rung.ladder, rung.position): one.smoothed for rung, one in smooth_all(measured, ladders).items()}
    assert smoothed == pytest.approx(
        {(0, 0): 0.005, (1, 0): 0.005, (0, 1): 0.025, (1, 1): 0.025, (2, 0): 0.45, (2, 1): 0.45}
    )


def test_a_loss_exactly_at_the_margin_passes_on_the_choosing_rows() -> None:
    found, _ = run([evenly(3)], [[0.0, 0.03, 0.04]], 0.03)
    assert sequence(found, 0.03)[-1].rung == Rung(0, 1)


def test_the_first_places_are_the_whole_model_and_then_thirds() -> None:
    def following(losses: dict[int, float], best: float = np.inf, rungs: int = 9) -> list[int]:
        return next_positions(Ladder(tuple(evenly(rungs))), losses, 0.03, best, rungs)

    assert following({}) == [0]
    assert following({0: 0.0}) == [3, 6]
    assert following({0: 0.0, 3: 0.01, 6: 0.1}) == [4, 5]
    assert following({0: 0.0, 3: 0.1}) == [1, 2]
    assert following({0: 0.04}) == []
    assert following({0: 0.0}, best=30) == [8]  # only it is cheaper
    assert following({0: 0.0}, rungs=1) == []


def test_smoothing_pools_what_falls_and_keeps_the_rest() -> None:
    assert smooth({4: 0.02, 0: 0.0, 2: 0.04}) == pytest.approx({0: 0.0, 2: 0.03, 4: 0.03})
    assert smooth({0: -0.01, 1: 0.02, 5: 0.02}) == pytest.approx({0: -0.01, 1: 0.02, 5: 0.02})
    assert smooth({}) == {}


@pytest.mark.parametrize("seed", range(100))
def test_the_sequence_goes_from_the_safest_to_the_smallest(seed: int) -> None:
    generator = np.random.default_rng(seed)
    ladders = int(generator.integers(1, 5))
    costs = [np.sort(generator.uniform(1, 100, 12))[::-1].tolist() for _ in range(ladders)]
    losses = [(np.linspace(0, 0.06, 12) + generator.normal(0, 0.015, 12)).tolist() for _ in range(ladders)]
    found, _ = run(costs, losses, 0.03)
    tests = sequence(found, 0.03)
    passing = [one for one in found.values() if one.smoothed <= 0.03]
    assert bool(tests) == bool(passing)
    assert len(tests) <= MOST_TESTS
    if passing:
        front = {one.rung for one in passing if not any(_beats(other, one) for other in passing)}
        assert all(np.diff([one.cost for one in tests]) < 0)
        assert tests[-1].cost == min(one.cost for one in passing)
        if tests[0].rung not in front:  # a whole model, before a pruned one that measured no worse
            assert tests[0].rung.position == 0
            tests, whole = tests[1:], 1
        else:
            whole = 0
        smoothed = [one.smoothed for one in tests]
        assert all(np.diff(smoothed) > 0)
        assert {one.rung for one in tests} <= front
        assert len(tests) == min(MOST_TESTS - whole, len(front))
        assert whole or smoothed[0] == min(one.smoothed for one in passing)


def test_of_candidates_that_lose_alike_one_is_tested() -> None:
    losses = [0.002, 0.001, 0.005, 0.006, 0.021, 0.027]
    costs = [292.0, 127.0, 82.0, 78.0, 67.0, 64.0]
    found = {
        Rung(0, at): Measured(Rung(0, at), cost, loss, loss)
        for at, (cost, loss) in enumerate(zip(costs, losses, strict=True))
    }
    assert [one.cost for one in sequence(found, 0.03)] == [292, 78, 67, 64]


def _beats(one: Measured, other: Measured) -> bool:
    """Whether it is smaller and loses no more, or loses less and is no larger."""
    ours, theirs = (one.cost, one.smoothed), (other.cost, other.smoothed)
    return ours != theirs and ours[0] <= theirs[0] and ours[1] <= theirs[1] + 1e-9
