"""A search whose rows to prove on have no labels."""

import csv
from pathlib import Path
from typing import Any

from helpers import words


def write_job(folder: Path) -> None:
    """`job.csv`, whose rows have labels, and `inputs.csv`, whose rows have none."""
    texts = [(f"{i} {word}", "ab"[i % 2]) for i, word in enumerate(words(420).split()[:420])]
    for name, columns, rows in (("job", ["text", "label"], texts[:120]), ("inputs", ["text"], texts[120:])):
        with (folder / f"{name}.csv").open("w", newline="") as target:
            csv.writer(target).writerows([columns, *(row[: len(columns)] for row in rows)])


def few_label_search(folder: Path, model: Path) -> dict[str, Any]:
    """A configuration of a search that has to prove 10 points; its files are written."""
    write_job(folder)
    return {
        "benchmarks": [{"data": str(folder / "job.csv"), "unlabelled": str(folder / "inputs.csv")}],
        "model": {"source": str(model), "dtype": "float32"},
        "calibration": {"samples": 4, "tokens": 32},
        "tuning": {"epochs": 8, "shots": 40, "held_out": 8, "learning_rate": 0.02},
        "pruning": {"ratios": [0.1386]},
        "goal": {"lose_at_most": 10, "types": ["q8_0"], "labels": str(folder / "to-label.csv")},
        "store": {"root": str(folder / "store"), "reports": None, "export": str(folder / "small")},
    }
