"""The answers of scored models, as a search reads them: to choose, to prove, and to prove again; and their record."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tailored_llama import data, evaluation
from tailored_llama.config import WRITTEN, SmallestConfig, accepted, named_benchmark
from tailored_llama.data import PromptSplit
from tailored_llama.errors import InputError
from tailored_llama.evaluation import Answer, Answers, Compared, Proof, Said
from tailored_llama.store import write_table

Labels = Mapping[str, Mapping[int, str]]  # by benchmark and example

PROOF, ASKED = "proof.parquet", "asked.parquet"
PROOF_SCHEMA = pa.schema(
    {
        "benchmark": pa.string(),
        "example": pa.int32(),
        "dense": pa.float64(),  # 1 where the answer is right; F1 may lie between
        "small": pa.float64(),
    }
)
ASKED_SCHEMA = pa.schema(  # a row for each of the proof, if labels were asked for
    {"benchmark": pa.string(), "reference": pa.string(), "label": pa.string()}
)

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

    `labels` are those that were asked for; None: all rows had theirs. InputError: the two were not asked alike.
    """
    evaluation.check_alike(dense, small)
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


def write_proof(config: SmallestConfig, answer: Answer, proof: Proof[Path], out: Path) -> None:
    """Write how both models answered every proving row that was tested; and by what, if labels were asked for.

    What was said, and the labels, leave as SHA-256 of their normal forms.
    """
    assert answer.proven is not None
    tests = answer.tested[answer.proven]
    columns: dict[str, list[Any]] = {name: [] for name in PROOF_SCHEMA.names}
    asked: dict[str, list[Any]] = {name: [] for name in ASKED_SCHEMA.names}
    for name, prompts in proof.prompts.items():
        dense, small, labels = proof.dense[name], proof.small[name], answer.labels.get(name)
        pair, rows = compared(config, name, dense, small, prompts, labels), tests[name].rows
        columns["benchmark"] += [name] * rows
        columns["example"] += pair.dense.examples[:rows].tolist()
        columns["dense"] += pair.dense.values[:rows].tolist()
        columns["small"] += pair.small.values[:rows].tolist()
        if labels is not None:
            said, forms = said_of(config, name, dense, prompts), label_forms(config, name, labels)
            asked["benchmark"] += [name] * rows
            asked["reference"] += map(digest_of, said.answers[:rows])
            asked["label"] += [digest_of(forms[row]) if row in forms else None for row in said.examples[:rows].tolist()]
    write_table(out / PROOF, columns, PROOF_SCHEMA)
    if asked["benchmark"]:
        write_table(out / ASKED, asked, ASKED_SCHEMA)
