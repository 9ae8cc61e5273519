"""Accuracy against bytes: the dense and the tailored model as they are, and in types of fewer bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tailored_llama.config import DENSE
from tailored_llama.evaluation.recovery import TAILORED, recovery_rows
from tailored_llama.evaluation.scores import read_metrics, read_score

WHOLE = "bfloat16"  # the type of a model that is not quantised: two bytes a parameter

ByType = Mapping[str, Mapping[str, Path]]  # type → benchmark → folder of the scores


@dataclass(frozen=True)
class BitsRow:
    """One row of `bits.parquet`: a model in a type, over all benchmarks.

    Accuracies and ratios are fractions; `cc_low` and `cc_high` bound a 95 % interval of the chance-corrected recovery,
    which is None for the dense model as it is, and where that model is not significantly above its floor.
    """

    ratio: float | None  # as configured; None: the dense model
    model: str  # dense or tailored
    type: str  # a GGUF type, or bfloat16
    bytes: int
    of_dense: float  # bytes ÷ those of the dense model in bfloat16
    accuracy: float
    stderr: float
    chance_corrected: float | None
    cc_low: float | None
    cc_high: float | None


def bits_rows(
    dense: ByType, tailored: ByType, parameters: Mapping[str, int], ratio: float | None = None, seed: int = 0
) -> list[BitsRow]:
    """A row for each model and type that is scored on every benchmark.

    All are compared with the dense model in bfloat16. Each benchmark has its own tailored model; they are equally large
    and have one configured `ratio`. `parameters` are those of the models dense and tailored.

    Raises:
        InputError: scores of a benchmark have different examples or metrics, or a file is missing or broken.
    """
    folders = {(model, kind): own for model, by in ((DENSE, dense), (TAILORED, tailored)) for kind, own in by.items()}
    labels = {key: DENSE if key == (DENSE, WHOLE) else " ".join(key) for key in folders}
    scores = {labels[key]: {name: read_score(path) for name, path in own.items()} for key, own in folders.items()}
    overall = {row.model: row for row in recovery_rows(scores, ratio, seed)}  # the last row of a model is its mean
    whole, rows = 2 * parameters[DENSE], []
    for (model, kind), own in folders.items():
        row = overall.get(labels[model, kind])
        if row is None or row.accuracy is None or row.stderr is None:
            continue
        size = 2 * parameters[model] if kind == WHOLE else max(read_metrics(path)["bytes"] for path in own.values())
        accuracy = (row.accuracy, row.stderr, row.chance_corrected, row.cc_low, row.cc_high)
        rows.append(BitsRow(ratio if model == TAILORED else None, model, kind, size, size / whole, *accuracy))
    return rows
