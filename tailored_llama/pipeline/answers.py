"""The answers of scored models, as a search reads them: to choose, to prove, and to prove again."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tailored_llama import data, evaluation
from tailored_llama.config import WRITTEN, SmallestConfig, accepted, named_benchmark
from tailored_llama.data import PromptSplit
from tailored_llama.errors import InputError
from tailored_llama.evaluation import Answers, Compared, Said

Labels = Mapping[str, Mapping[int, str]]  # by benchmark and example

NO_ANSWER = "\0"  # the normal form of the label of a row for which no answer is right


def said_of(config: SmallestConfig, name: str, scores: Path, prompts: Path, split: PromptSplit = "evaluation") -> Said:
    """What a scored model answered on a benchmark, in the normal form of its metric."""
    benchmark = named_benchmark(config, name)
    return evaluation.read_said(scores, prompts, split, data.headline_metric(benchmark), benchmark.ignore)


def label_forms(config: SmallestConfig, name: str, labels: Mapping[int, str]) -> dict[int, str]:
    """Labels in the normal form of their benchmark's metric; that of none of the answers equals no answer.

    Raises:
        InputError: a label is no JSON or no call where it has to be.
    """
    benchmark = named_benchmark(config, name)
    metric = data.headline_metric(benchmark)
    form, kind = evaluation.answer_form(metric, benchmark.ignore), WRITTEN.get(metric, "written")
    for label in labels.values():
        if label != data.NONE and not accepted(label, kind):
            raise InputError(f"{name}: got the label {label[:80]!r}; allowed: {'JSON' if kind == 'json' else 'a call'}")
    return {row: NO_ANSWER if label == data.NONE else form(label) for row, label in labels.items()}


def compared(
    config: SmallestConfig, name: str, dense: Path, small: Path, prompts: Path, labels: Mapping[int, str] | None
) -> Compared:
    """Compare the scores of two models on the proving rows of a benchmark.

    `labels` are those that were asked for; None: all rows had theirs.
    """
    if labels is None:
        before, after = (answers_of(config, name, scores, prompts) for scores in (dense, small))
        return Compared(before, after, np.zeros(len(before.examples), dtype=bool))
    first, other = (said_of(config, name, scores, prompts) for scores in (dense, small))
    return evaluation.compare_said(first, other, label_forms(config, name, labels))


def answers_of(
    config: SmallestConfig, name: str, scores: Path, prompts: Path, split: PromptSplit = "evaluation"
) -> Answers:
    """The answers of a scored model on a benchmark, to all rows with a label."""
    benchmark = named_benchmark(config, name)
    answers = evaluation.read_answers(scores, data.headline_metric(benchmark))
    if not benchmark.unlabelled:
        return answers
    known = [prompt.example for prompt in data.read_prompts(prompts, split) if prompt.answer != data.UNLABELLED]
    return answers.take(np.isin(answers.examples, known))


def digest_of(form: str) -> str:
    """SHA-256 of an answer or a label in its normal form."""
    return hashlib.sha256(form.encode()).hexdigest()
