"""The search for widths: from what each block costs alone, to exchanges between blocks that lower the divergence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tailored_llama.progress import Progress
from tailored_llama.pruning.plan import Block
from tailored_llama.pruning.supernet import Levels, Supernet

_TRIALS = 4  # evaluations that a round keeps for its exchanges

Costs = Sequence[Sequence[float]]  # of every block at every level
Changes = Mapping[int, Mapping[int, float]]  # of the divergence, by block and by step
Divergence = Callable[[Levels], float]


@dataclass(frozen=True)
class Step:
    """A choice of widths that the search went through, and how many models it had evaluated by then."""

    name: str
    levels: Levels
    divergence: float
    evaluations: int


def search(
    net: Supernet, scores: np.ndarray[Any, Any], budget: int, evaluations: int, seed: int, progress: Progress
) -> list[Step]:
    """Choose the level of every block, so that the divergence is low and about `budget` parameters leave.

    1. Two choices are made by a knapsack: by the importance of what leaves, which is the global ranking, and by the
       divergence of each block alone at several levels (as SPDY does, arXiv 2201.13096). The better one is the start.
    2. In every round, each block alone is made a step narrower and a step wider. Those that cost least are exchanged
       with those that gain most, all pairs at once; if that is not better, the better half of the pairs, and so on.

    Divergences are measured, never predicted: a round that brings nothing leaves the choice as it is.

    Args:
        net: the supernet; it holds the dense model.
        scores: importance of all groups, as they are ranked.
        budget: parameters to remove. Never more leave, and less only by one step.
        evaluations: models that the rounds may evaluate. With less than two for every block, a round looks at some of
            them, drawn by `seed`.
        progress: called after every evaluation.

    Returns:
        Both starts, the better one last, and every accepted exchange.
    """
    blocks, rng = net.blocks, np.random.default_rng(seed)
    total = most_evaluations(blocks, evaluations)

    def divergence(levels: Levels) -> float:
        value = net.divergence(levels)
        progress(net.evaluations, total)
        return value

    ranked = [[float(scores[block.leaving(level)].sum()) for level in range(len(block.widths))] for block in blocks]
    costs = {"ranking": ranked, "blocks alone": _alone(blocks, divergence)}
    starts = [(name, cheapest(blocks, own, budget)) for name, own in costs.items()]
    steps = [Step(name, levels, divergence(levels), net.evaluations) for name, levels in starts]
    steps.sort(key=lambda step: -step.divergence)
    last = net.evaluations + evaluations
    while (room := last - net.evaluations) > _TRIALS:
        levels, before = steps[-1].levels, steps[-1].divergence
        net.hold(levels)
        looked = rng.permutation(len(blocks))[: (room - _TRIALS + 1) // 2].tolist()
        pairs = _pairs(blocks, levels, _changes(blocks, levels, looked, before, divergence), budget)
        while pairs and net.evaluations < last:
            exchanged = {index: levels[index] + by for pair in pairs for index, by in zip(pair, (1, -1), strict=True)}
            after = divergence(_with(exchanged, levels))
            if after < before:
                steps.append(Step("exchange", _with(exchanged, levels), after, net.evaluations))
                break
            pairs = pairs[: len(pairs) // 2]
        if not pairs and len(looked) == len(blocks):
            break
    progress(total, total)
    return steps


def most_evaluations(blocks: Sequence[Block], evaluations: int) -> int:
    """How many models a search evaluates at most: of blocks alone, of both starts, and in its rounds."""
    return sum(len(_measured(block)) for block in blocks) + 2 + evaluations


def removed(blocks: Sequence[Block], levels: Levels) -> int:
    """Parameters that leave at a choice of levels."""
    return sum(block.removed(level) for block, level in zip(blocks, levels, strict=True))


def _alone(blocks: Sequence[Block], divergence: Divergence) -> Costs:
    """The divergence of every block at every level, with all others dense; between measured levels on a line."""
    dense, costs = (0,) * len(blocks), []
    for index, block in enumerate(blocks):
        levels = _measured(block)
        found = [divergence(_with({index: level}, dense)) for level in levels]
        costs.append(np.interp(range(len(block.widths)), [0, *levels], [0.0, *found]).tolist())
    return costs


def _changes(
    blocks: Sequence[Block], levels: Levels, looked: Sequence[int], before: float, divergence: Divergence
) -> Changes:
    """What it does to the divergence to make some blocks, each alone, a step narrower (1) and a step wider (−1)."""
    return {
        index: {
            by: divergence(_with({index: levels[index] + by}, levels)) - before
            for by in (1, -1)
            if 0 <= levels[index] + by < len(blocks[index].widths)
        }
        for index in looked
    }


def _measured(block: Block) -> list[int]:
    """The levels at which a block is measured alone; those between are interpolated."""
    last = len(block.widths) - 1
    return sorted({level for level in (1, 2, 4) if level < last} | {last})


def _with(changed: Mapping[int, int], levels: Levels) -> Levels:
    return tuple(changed.get(index, level) for index, level in enumerate(levels))


def cheapest(blocks: Sequence[Block], costs: Costs, budget: int) -> Levels:
    """Levels of low total cost at which as many parameters leave as the budget allows: the greedy knapsack.

    It always takes the step, over one or several levels, of the lowest cost per parameter.
    """
    levels, left = [0] * len(blocks), budget
    while True:
        best: tuple[float, int, int, int] | None = None
        for index, block in enumerate(blocks):
            now = levels[index]
            for level in range(now + 1, len(block.widths)):
                size = block.removed(level) - block.removed(now)
                if size > left:
                    break
                step = (costs[index][level] - costs[index][now]) / size, index, level, size
                best = step if best is None or step[0] < best[0] else best
        if best is None:
            return tuple(levels)
        _, index, levels[index], size = best
        left -= size


def _pairs(blocks: Sequence[Block], levels: Levels, changes: Changes, budget: int) -> list[tuple[int, int]]:
    """Pairs of a block to narrow and one to widen by a step, the most promising first; each block comes once.

    They leave the parameters removed between the budget and one step less.
    """
    largest = max(b.removed(n + 1) - b.removed(n) for b in blocks for n in range(len(b.widths) - 1))
    narrow = sorted((change[1], index) for index, change in changes.items() if 1 in change)
    widen = sorted((change[-1], index) for index, change in changes.items() if -1 in change)
    gone, pairs, used = removed(blocks, levels), list[tuple[int, int]](), set[int]()
    for loss, one in narrow:
        for gain, other in widen:
            if loss + gain >= 0:
                break
            if one == other or {one, other} & used:
                continue
            by = blocks[one].removed(levels[one] + 1) - blocks[one].removed(levels[one])
            by -= blocks[other].removed(levels[other]) - blocks[other].removed(levels[other] - 1)
            if budget - largest < gone + by <= budget:
                gone += by
                used |= {one, other}
                pairs.append((one, other))
                break
    return pairs
