"""A search whose rows to prove on have no labels."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import words
from tailored_llama.pipeline import bases, candidates, steps
from tailored_llama.pipeline.bases import Base, Step
from tailored_llama.pipeline.candidates import Candidate


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


def tune_trimmed_models(patch: pytest.MonkeyPatch) -> None:
    """Let candidates of which only tokens leave be tuned apart, so that they answer some rows otherwise.

    The smallest of three vocabularies is not tried: as it happens, it answers as the dense model does.
    """
    make = candidates.make

    def tuned(base: Base, step: Step, kind: Any, whole: Candidate) -> Candidate:
        candidate = make(base, step, kind, whole)
        if not step.tokens:
            return candidate
        adapters = steps.tune_adapters(base.config, step.ratio, candidate.checkpoint, base.prompts)
        return replace(candidate, adapter=next(iter(adapters.values())))

    patch.setattr(candidates, "make", tuned)
    patch.setattr(bases, "WHOLE", bases.WHOLE[:2])
