"""The search for the smallest model: which candidates are measured next, and which are tested in which order."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import scipy

MOST_TESTS = 4  # candidates that may be tested on the proving rows
HOPELESS = 2  # margins: what loses more is not tried in fewer bits; what loses less may have measured badly
_PROJECTIONS, _ROUNDING = 100, 1e-9  # at most so many; differences of losses that are none
AT_ONCE = 2  # rungs that are measured side by side, on however many workers, so that workers change no answer


@dataclass(frozen=True)
class Ladder:
    """One base model in one type, from the whole model (rung 0) to the smallest.

    Accuracy falls along a ladder, but for noise. So it is searched as a sorted list is, and its losses are smoothed.
    """

    costs: tuple[float, ...]  # estimates by rung
    reference: bool = False  # its whole model is the reference itself, which loses nothing and is no candidate
    above: int | None = None  # the position of the ladder of the same model in more bits


@dataclass(frozen=True, order=True)
class Rung:
    """A position on a ladder."""

    ladder: int
    position: int


@dataclass(frozen=True)
class Measured:
    """A candidate: its cost, in the unit of the goal, and what it loses on the choosing rows, a share."""

    rung: Rung
    cost: float
    loss: float
    smoothed: float = math.nan  # along each ladder and from more bits to fewer, among all that are measured


def search(
    ladders: Sequence[Ladder], measure: Callable[[Sequence[Rung]], Sequence[Measured]], margin: float
) -> dict[Rung, Measured]:
    """Find, on every ladder in turn, the smallest candidate that loses no more than the margin, a share.

    Rungs that cannot be smaller than the best so far, by their estimated costs, are passed over. A ladder whose whole
    model loses too much is left. Ladders of more bits come first: what loses twice the margin there is not tried in
    fewer. `measure` measures rungs of one ladder, which do not depend on each other.
    """
    measured: dict[Rung, Measured] = {}
    for number, ladder in enumerate(ladders):
        rungs = len(ladder.costs)
        if ladder.above is not None:  # only as many as come there before the first that loses too much
            above = smooth(_losses(measured, ladders, ladder.above))
            rungs = max((at + 1 for at, loss in above.items() if loss <= HOPELESS * margin), default=0)
        while True:
            losses = _losses(measured, ladders, number)
            best = min((tried.cost for tried in measured.values() if tried.smoothed <= margin), default=math.inf)
            if not (positions := next_positions(ladder, losses, margin, best, rungs)):
                break
            found = measure([Rung(number, position) for position in positions])
            measured = smooth_all(measured | {tried.rung: tried for tried in found}, ladders)
    return measured


def _losses(measured: Mapping[Rung, Measured], ladders: Sequence[Ladder], number: int) -> dict[int, float]:
    known = {0: 0.0} if ladders[number].reference else {}
    return known | {rung.position: tried.loss for rung, tried in measured.items() if rung.ladder == number}


def next_positions(ladder: Ladder, losses: Mapping[int, float], margin: float, best: float, rungs: int) -> list[int]:
    """The positions of a ladder to measure next: between the last that passes and the first that does not.

    At last comes the position before the last that passes, if that loses more than half of the margin. `best`
    is the cost of the best candidate so far, of any ladder. Only the first `rungs` come into question.
    """
    if not losses:
        return [0] if rungs else []
    smoothed = smooth(losses)
    failing = min([rungs, *(position for position, loss in smoothed.items() if loss > margin)])
    passing = max((position for position in smoothed if position < failing), default=failing)
    open_positions = [position for position in range(passing + 1, failing) if ladder.costs[position] < best]
    if not open_positions:  # what loses much may not be proven, so that one that loses less has to be known, too
        safer = passing - 1
        return [safer] if passing in smoothed and smoothed[passing] > margin / 2 and safer not in {-1, *losses} else []
    step = len(open_positions) / (AT_ONCE + 1)
    return sorted({open_positions[int(step * (turn + 1))] for turn in range(AT_ONCE)})


def smooth(losses: Mapping[int, float]) -> dict[int, float]:
    """Losses by position, as near to the measured ones as losses that never fall can be (least squares)."""
    positions = sorted(losses)
    return dict(zip(positions, _rising([losses[position] for position in positions]), strict=True))


def _rising(losses: Sequence[float]) -> Sequence[float]:
    return scipy.optimize.isotonic_regression(losses).x.tolist() if losses else ()


def smooth_all(measured: Mapping[Rung, Measured], ladders: Sequence[Ladder]) -> dict[Rung, Measured]:
    """Smooth losses, which then fall neither along a ladder nor to fewer bits, as near to the measured ones as can be.

    With 160 rows, the noise is several points: a model in four bits may measure better than the same one in eight. It
    is not. Projections onto either order in turn come to the nearest losses that have both (Boyle and Dykstra 1986).
    """
    smoothed = {rung: tried.loss for rung, tried in measured.items()}
    smoothed |= {Rung(number, 0): 0.0 for number, ladder in enumerate(ladders) if ladder.reference}
    tops: list[int] = []  # of every ladder, that of the same model in most bits
    for number, ladder in enumerate(ladders):
        tops.append(number if ladder.above is None else tops[ladder.above])
    along = _chains(smoothed, lambda rung: (rung.ladder, 0))
    across = _chains(smoothed, lambda rung: (tops[rung.ladder], rung.position))
    removed = [dict.fromkeys(smoothed, 0.0) for _ in (along, across)]
    for _ in range(_PROJECTIONS):
        before = dict(smoothed)
        for chains, corrections in zip((along, across), removed, strict=True):
            for chain in chains:
                wanted = [smoothed[rung] + corrections[rung] for rung in chain]
                for rung, value, loss in zip(chain, wanted, _rising(wanted), strict=True):
                    smoothed[rung], corrections[rung] = loss, value - loss
        if all(abs(smoothed[rung] - before[rung]) < _ROUNDING for rung in smoothed):
            break
    return {rung: replace(tried, smoothed=smoothed[rung]) for rung, tried in measured.items()}


def _chains(rungs: Iterable[Rung], group: Callable[[Rung], tuple[int, int]]) -> list[list[Rung]]:
    """The rungs of each group, in the order in which losses do not fall."""
    return [list(chain) for _, chain in groupby(sorted(sorted(rungs), key=group), group)]


def sequence(measured: Mapping[Rung, Measured], margin: float) -> list[Measured]:
    """The candidates to test on the proving rows, at most four, the safest first.

    Those that pass on the choosing rows and are smaller than every one that loses less. Before them comes a whole model
    that is larger, if one passes: of those that lose least the largest, which is the safer even if it measured alike.
    Of more than four, the safest and the smallest stay, and those between them whose losses are furthest apart: of two
    that lose alike, one is enough.
    """
    passing = [tried for tried in measured.values() if tried.smoothed <= margin]
    front: list[Measured] = []
    for tried in sorted(passing, key=lambda tried: (tried.cost, tried.smoothed)):
        if not front or tried.smoothed < front[-1].smoothed - _ROUNDING:
            front.append(tried)
    front.reverse()
    safer = [tried for tried in passing if not tried.rung.position and tried.cost > front[0].cost]
    if safer:
        least = min(tried.smoothed for tried in safer) + _ROUNDING
        front.insert(0, max((tried for tried in safer if tried.smoothed <= least), key=lambda tried: tried.cost))
    if len(front) <= MOST_TESTS:
        return front
    picked = {0, len(front) - 1}
    while len(picked) < MOST_TESTS:
        apart = [min(abs(tried.smoothed - front[other].smoothed) for other in picked) for tried in front]
        picked.add(max(set(range(len(front))) - picked, key=apart.__getitem__))
    return [front[position] for position in sorted(picked)]


def nearest(measured: Mapping[Rung, Measured]) -> Measured:
    """The candidate that loses least on the choosing rows; of several, the smallest."""
    return min(measured.values(), key=lambda tried: (tried.smoothed, tried.cost))
