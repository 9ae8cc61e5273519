"""The division of one file's rows: those to tune on, to choose with and to report on.

A hash of a row's content decides, whatever else is in the file. Therefore no row moves to another part when rows are
added, removed or put in another order, and equal rows are always in the same part. Thresholds on the hash that depended
on the number of rows would move rows, so they are fixed, and must do for 150 rows as for 10,000:

- To tune on, 45 %: the default of 50 shots and some rows held out. Of 150 rows, these are too few in 0.2 % of files.
- To report on, 40 %: as many as can be, because they are the evidence.
- To choose with, 15 %: the rest. A wrong choice costs a better model, but the rows to report on still judge it.

A large file has more to tune on than is needed. A larger share to report on would gain it little: the difference that a
comparison can show shrinks with the square root of the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from tailored_llama.data.splits import Split

# Other shares move rows: raise the version of the stage `examples` with them.
SHARES: dict[Split, float] = {"train": 0.45, "selection": 0.15, "evaluation": 0.4}
PURPOSE: dict[Split, str] = {"train": "to tune on", "selection": "to choose with", "evaluation": "to report on"}


def part_of(content: Sequence[str]) -> Split:
    """The part of a row with these texts."""
    place = int.from_bytes(hashlib.sha256(_plain(content).encode()).digest()[:8]) / 2**64
    if place < SHARES["train"]:
        return "train"
    return "selection" if place < SHARES["train"] + SHARES["selection"] else "evaluation"


def divide(contents: Sequence[Sequence[str]]) -> dict[Split, list[int]]:
    """The positions of the rows in each part, in order; of rows with equal content, only the first."""
    first: dict[str, int] = {}
    for position, content in enumerate(contents):
        first.setdefault(_plain(content), position)
    return {part: [i for i in first.values() if part_of(contents[i]) == part] for part in SHARES}


def _plain(content: Sequence[str]) -> str:
    """The texts as one ASCII text that does not tell how their white space was written."""
    return json.dumps([" ".join(text.split()) for text in content])
