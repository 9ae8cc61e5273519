"""The records of a training beside the weights: its logs, and what an adapter does on held-out examples beside none.

Tuning lowers the loss of the right answer's words. That can fall while the accuracy does not rise, so both models are
compared on the same examples, by what the metric counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tailored_llama.config import TuningConfig
from tailored_llama.store import read_table, write_table

LOG = "log.parquet"
LOG_SCHEMA = pa.schema(
    {
        "step": pa.int32(),
        "epoch": pa.int32(),
        "loss": pa.float64(),
        "learning_rate": pa.float64(),
        "held_out_loss": pa.float64(),  # before the first step, and after every epoch
    }
)

FEW = 20  # held-out examples, on fewer of which the paired error of an accuracy is above ten points
FILE = "held_out.parquet"
HELD_OUT_SCHEMA = pa.schema(
    {
        "example": pa.int32(),
        "untuned_loss": pa.float64(),  # over the choices, or of the written answer's tokens; see `Outcome`
        "tuned_loss": pa.float64(),
        "untuned_right": pa.bool_(),  # null where the model writes the answer
        "tuned_right": pa.bool_(),
    }
)


@dataclass(frozen=True)
class Outcome:
    """A model on one held-out example, with losses in nats.

    `loss` is the cross-entropy over the choices' log-likelihoods, compared as the metric compares them, or the mean
    negative log-likelihood of a written answer's tokens. `right`: whether the metric counts the likeliest choice as
    right; None for a written answer. `answer_loss` is the mean negative log-likelihood of the right choice's tokens.
    """

    loss: float
    right: bool | None
    answer_loss: float


@dataclass(frozen=True)
class Comparison:
    """An adapter (tuned) and its base (untuned) on the same held-out examples.

    Accuracies are over the examples with choices. Errors are paired: the sample standard deviation of the examples'
    differences ÷ √examples, None for fewer than two.
    """

    examples: int
    untuned_loss: float
    tuned_loss: float
    loss_error: float | None
    untuned_accuracy: float | None = None
    tuned_accuracy: float | None = None
    accuracy_error: float | None = None

    @property
    def loss_gain(self) -> float:
        """By how much the adapter lowers the loss."""
        return self.untuned_loss - self.tuned_loss

    @property
    def accuracy_gain(self) -> float | None:
        """By how much the adapter raises the accuracy."""
        tuned, untuned = self.tuned_accuracy, self.untuned_accuracy
        return None if tuned is None or untuned is None else tuned - untuned


def is_better(comparison: Comparison | None) -> bool | None:
    """Return whether an adapter is better than none on held-out examples; None where they cannot tell.

    Accuracy decides where it differs by more than its paired standard error. Where it does not, or where the model
    writes its answers, the loss decides if it differs by more than its own. If neither does, tuning brought nothing.
    But fewer than `FEW` examples hide a large gain, and so they do not say that.
    """
    if comparison is None or comparison.loss_error is None:
        return None
    gain, error = comparison.accuracy_gain, comparison.accuracy_error
    if gain is not None and error is not None and _exceeds(abs(gain), error):
        return gain > 0
    if _exceeds(abs(comparison.loss_gain), comparison.loss_error):
        return comparison.loss_gain > 0
    return None if comparison.examples < FEW else False


def ships_adapter(tuning: TuningConfig, comparison: Comparison | None) -> bool:
    """Return whether a finished model gets its adapter (`tuning.keep`); without a verdict it does."""
    return tuning.keep == "always" or is_better(comparison) is not False


def _exceeds(gain: float, error: float) -> bool:
    """Strictly, whatever rounding does: the error of one example more is exactly its gain, 1 / n."""
    return gain > error and not math.isclose(gain, error)


def write_comparison(out: Path, examples: Sequence[int], untuned: Sequence[Outcome], tuned: Sequence[Outcome]) -> None:
    """Write both models' outcomes as `held_out.parquet`; nothing without examples."""
    if not examples:
        return
    columns: dict[str, Any] = {"example": examples}
    for name, model in (("untuned", untuned), ("tuned", tuned)):
        columns |= {f"{name}_loss": [row.loss for row in model], f"{name}_right": [row.right for row in model]}
    write_table(out / FILE, columns, HELD_OUT_SCHEMA)


def read_comparison(adapter: Path) -> Comparison | None:
    """The comparison in an adapter's folder, None if nothing was held out; an InputError if the table is broken."""
    if not (adapter / FILE).is_file():
        return None
    table = read_table(adapter / FILE, HELD_OUT_SCHEMA).to_pydict()
    untuned, tuned, loss_error = _paired(table["untuned_loss"], table["tuned_loss"])
    chosen = [pair for pair in zip(table["untuned_right"], table["tuned_right"], strict=True) if None not in pair]
    accuracies = _paired(*zip(*chosen, strict=True)) if chosen else (None, None, None)
    return Comparison(len(table["example"]), untuned, tuned, loss_error, *accuracies)


def _paired(untuned: Sequence[float], tuned: Sequence[float]) -> tuple[float, float, float | None]:
    """Both means, and the standard error of their difference."""
    before, after = np.array(untuned, float), np.array(tuned, float)
    error = float(np.std(after - before, ddof=1)) / math.sqrt(len(before)) if len(before) > 1 else None
    return float(before.mean()), float(after.mean()), error
