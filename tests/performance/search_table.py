"""The table of a search among the results, from its report.

    python tests/performance/search_table.py REPORT docs/results/search.csv

REPORT is the folder with answer.json, such as `reports/smallest-smallest` after a search of data/smallest.toml. Copy
its `frontier.png` to docs/images, write the figures of the proof into docs/results/claims.toml, and run `make pages`.
"""

import csv
from pathlib import Path
from typing import Annotated

import typer

from tailored_llama.evaluation import read_answer
from tailored_llama.reports.smallest import _outcome


def main(report: Path, table: Path, seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0) -> None:
    answer = read_answer(report)
    title = "loss on the choosing rows, points"
    lines = [["base", "removed %", "type", "MB", title, "outcome", "seeds", "examples"]]
    rows = sum(sets["choosing"].rows for sets in answer.sets.values())
    for place, one in enumerate(answer.candidates):
        removed = f"{100 * one.ratio:.0f}" if one.ratio else ""
        kind = "as it is" if one.type == "source" else one.type or "16 bits"
        cells = [one.base, removed, kind, f"{one.bytes / 1e6:.0f}", f"{100 * one.loss:.1f}"]
        lines.append([*cells, _outcome(answer, place), str(seed), str(rows)])
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    for place, tests in answer.tested.items():
        for name, test in tests.items():
            proof = f"{100 * test.loss:.1f} points (at most {100 * test.bound:.2f}) on {test.rows:,} rows of {name}"
            print(f"{answer.candidates[place].label}: {proof}")


if __name__ == "__main__":
    typer.run(main)
