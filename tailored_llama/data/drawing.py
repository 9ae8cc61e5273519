"""Examples drawn from a split: by seed to show as solved, to tune on and to hold out, or evenly spaced to report on."""

import random
from collections.abc import Sequence

from tailored_llama.data.benchmarks import Example
from tailored_llama.errors import InputError


def select_train(
    examples: Sequence[Example], shots: int, held_out: int, seed: int, *, benchmark: str
) -> tuple[list[Example], list[Example]]:
    """Draw the shots and the held-out examples from the train split, by seed, without overlap.

    Each draw has as equal numbers of every answer index as the split allows, in shuffled order. The shots do not
    depend on how many examples are held out. InputError: more are requested than the split holds.
    """
    if shots + held_out > (size := len(examples)):
        got = f"{shots}, beside {held_out} to hold out (tuning.held_out)"
        allowed = f"at most {size} together, the train examples of {benchmark} to draw from"
        raise InputError(f"tuning.shots: got {got}; allowed: {allowed}")
    generator = random.Random(seed)
    remaining: dict[int, list[Example]] = {}
    for example in examples:
        remaining.setdefault(example.answer, []).append(example)
    for label in sorted(remaining):
        generator.shuffle(remaining[label])
    return _draw(remaining, shots, generator), _draw(remaining, held_out, generator)


def _draw(remaining: dict[int, list[Example]], count: int, generator: random.Random) -> list[Example]:
    """Take `count` examples out of `remaining`, one of every label in turn while they last."""
    drawn: list[Example] = []
    while len(drawn) < count:
        labels = sorted(label for label, examples in remaining.items() if examples)
        generator.shuffle(labels)  # decides which labels get one more if the count does not divide evenly
        drawn += [remaining[label].pop() for label in labels[: count - len(drawn)]]
    generator.shuffle(drawn)
    return drawn


def without(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    used = {example.index for example in others}
    return [example for example in examples if example.index not in used]


def select_evaluation(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """`limit` examples evenly spaced over the split, in order, starting with its first; all if it has no more.

    The first rows of a split need not be like the rest: HellaSwag's first 3,243 all come from ActivityNet.
    """
    if limit is None or limit >= len(examples):
        return list(examples)
    return [examples[i * len(examples) // limit] for i in range(limit)]
