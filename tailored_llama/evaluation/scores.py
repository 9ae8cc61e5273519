"""Read scores: the metrics, the answers, and the score of one model on one benchmark."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tailored_llama.config import WRITTEN
from tailored_llama.data import PromptSplit, read_prompts
from tailored_llama.errors import InputError
from tailored_llama.evaluation.statistics import Answers, Array, check_same_examples, difference, interval
from tailored_llama.evaluation.written import answer_form, answers_schema
from tailored_llama.store import read_table

PREDICTIONS_SCHEMA = pa.schema(
    {
        "example": pa.int32(),
        "loglikelihoods": pa.list_(pa.float64()),
        "prediction": pa.int32(),
        "prediction_norm": pa.int32(),
        "answer": pa.int32(),
    }
)
_CHOSEN = {"acc": "prediction", "acc_norm": "prediction_norm"}  # the column with the position of a choice by metric


@dataclass(frozen=True)
class Score:
    """One model on one benchmark, in the headline metric; `bytes` are those of its GGUF file, if it was scored."""

    metric: str
    floor: float
    accuracy: float
    stderr: float
    answers: Answers
    bytes: int | None = None


def metrics(values: Mapping[str, Sequence[float] | Array]) -> dict[str, float]:
    """The mean of every metric over the examples, with its standard error (sample standard deviation ÷ √n)."""
    result: dict[str, float] = {}
    for name, samples in values.items():
        deviation = float(np.std(samples, ddof=1)) if len(samples) > 1 else 0.0
        result |= {name: float(np.mean(samples)), f"{name}_stderr": deviation / math.sqrt(len(samples))}
    return result


def hits(predictions: Mapping[str, Any]) -> dict[str, Array]:
    """acc and acc_norm of every example: 1 if the right choice is the likeliest (per character), else 0."""
    right = np.asarray(predictions["answer"])
    return {name: (np.asarray(predictions[column]) == right).astype(float) for name, column in _CHOSEN.items()}


def read_metrics(folder: Path) -> dict[str, Any]:
    """`metrics.json` of a scored benchmark or a perplexity; InputError if it is missing or not JSON."""
    try:
        return dict(json.loads((folder / "metrics.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{folder / 'metrics.json'}: missing or not JSON") from None


def check_alike(*folders: Path) -> None:
    """Check that models were asked alike on a benchmark: by the same runtime, with the same limits on an answer.

    Raises:
        InputError: they were not, so that a difference between them would not be one between models.
    """
    first, *others = (dict(read_metrics(folder)["asking"]) for folder in folders)
    for other in others:
        for field in {**first, **other}:
            if (got := other.get(field)) != (allowed := first.get(field)):
                told = f"got {got!r:.200}; allowed: {allowed!r:.200}, as the first model was asked"
                raise InputError(f"asking.{field}: {told}")


def _read_table(folder: Path, metric: str) -> pa.Table:
    if metric in WRITTEN:
        return read_table(folder / "answers.parquet", answers_schema(metric))
    return read_table(folder / "predictions.parquet", PREDICTIONS_SCHEMA)


def read_answers(folder: Path, metric: str) -> Answers:
    """The answers of a scored model, with their values in a metric."""
    table = _read_table(folder, metric)
    if metric in WRITTEN:
        wanted = np.array(["\n".join(accepted) for accepted in table["accepted"].to_pylist()])
        return Answers(table["example"].to_numpy(), wanted, table[metric].to_numpy())
    return Answers(table["example"].to_numpy(), table["answer"].to_numpy(), hits(table)[metric])


def choice_probabilities(loglikelihoods: Sequence[float], lengths: Sequence[int], metric: str) -> Array:
    """The probabilities of choices among each other, which are the softmax of what the metric compares.

    That is log-likelihoods, for acc_norm per character. Those are multiplied by the mean length of the choices. Without
    that, all choices are nearly equally likely whatever the model, and no loss is ever large.
    """
    characters = np.array(lengths if metric == "acc_norm" else [1] * len(lengths))
    compared = np.array(loglikelihoods) / characters * characters.mean()
    weights = np.exp(compared - compared.max())
    return np.asarray(weights / weights.sum())


def read_chosen(folder: Path, metric: str) -> dict[int, int | str]:
    """Read what a scored model answered, by example: the position of its choice, or the text that it wrote."""
    table = _read_table(folder, metric)
    return dict(zip(table["example"].to_pylist(), table[_CHOSEN.get(metric, "text")].to_pylist(), strict=True))


@dataclass(frozen=True)
class Said:
    """What a model answered to rows, in the normal form of the metric: the same answers are equal texts."""

    examples: Array  # int [n]
    answers: Array  # str [n]


def read_said(folder: Path, prompts: Path, split: PromptSplit, metric: str, ignore: Sequence[str] | None) -> Said:
    """Read what a scored model answered, so that it can be compared with another's answers or with labels.

    The prompts have the texts of the choices. An answer that is none of them is empty.
    """
    chosen, form = read_chosen(folder, metric), answer_form(metric, ignore)
    offered = {prompt.example: prompt.continuations for prompt in read_prompts(prompts, split)}
    texts = [said if isinstance(said, str) else offered[row][said] if said >= 0 else "" for row, said in chosen.items()]
    return Said(np.array([*chosen]), np.array([form(text) for text in texts], dtype=object))


def read_score(*folders: Path) -> Score:
    """Read what `score_benchmark` wrote; several folders of the same examples are averaged example by example.

    Raises:
        InputError: a file is missing or broken, or the examples differ.
    """
    scores = [_read_one(folder) for folder in folders]
    if len(scores) == 1:
        return scores[0]
    check_comparable("several seeds", *scores)
    values = np.mean([score.answers.values for score in scores], axis=0)
    averages, answers = metrics({"mean": values}), replace(scores[0].answers, values=values)
    return replace(scores[0], accuracy=averages["mean"], stderr=averages["mean_stderr"], answers=answers)


def _read_one(folder: Path) -> Score:
    fields = read_metrics(folder)
    metric = str(fields.get("metric"))
    try:
        floor, accuracy, stderr = (float(fields[key]) for key in ("floor", metric, f"{metric}_stderr"))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{folder / 'metrics.json'}: floor, metric or its value is missing") from None
    return Score(metric, floor, accuracy, stderr, read_answers(folder, metric), fields.get("bytes"))


def check_comparable(name: str, *scores: Score) -> None:
    """Check that scores on a benchmark have the same examples and the same metric; raises InputError otherwise."""
    for other in scores[1:]:
        if other.metric != scores[0].metric:
            raise InputError(f"scores of {name}: {scores[0].metric} against {other.metric}; allowed: one metric")
        try:
            check_same_examples(scores[0].answers, other.answers)
        except ValueError as error:
            raise InputError(f"scores of {name}: {error}; allowed: scores of the same examples") from None


def compare_scores(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Compare models on one benchmark, each with the first, from the folders that `score_benchmark` wrote.

    Returns:
        A row for each model: its name, its score in the headline metric with the standard error, and the difference
        from the first with its 95 % interval, by paired bootstrap. All are shares.

    Raises:
        InputError: the benchmarks, metrics or examples differ, or a file is missing or broken.
    """
    benchmarks = dict.fromkeys(str(read_metrics(folder).get("benchmark")) for folder in folders.values())
    if len(benchmarks) > 1:
        raise InputError(f"scores: {' against '.join(benchmarks)}; allowed: one benchmark")
    scores, rows = {name: read_score(folder) for name, folder in folders.items()}, []
    check_comparable(next(iter(benchmarks)), *scores.values())
    for name, score in scores.items():
        lead = difference(score.answers, next(iter(scores.values())).answers)
        low, high = interval(lead.draws)
        figures = {"model": name, score.metric: score.accuracy, "stderr": score.stderr, "difference": lead.value}
        rows.append(figures | {"low": low, "high": high, "examples": len(score.answers.examples)})
    return rows
