"""The certificate of a proven model: what is claimed of it, on which rows, and how the proof went."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tailored_llama.config import SmallestConfig
from tailored_llama.data import headline_metric
from tailored_llama.evaluation import Answer, LossTest, is_proven
from tailored_llama.models import Base, lost_words, write_card
from tailored_llama.reports.model_card import prompt_of
from tailored_llama.reports.pages import page_template
from tailored_llama.reports.parts import lost, megabytes, number, p_value
from tailored_llama.reports.tables import Column, Table, table_row

_FORMAT = 1
_LIBRARIES = ("tailored-llama", "torch", "transformers", "gguf")
_COSTS = {  # what is to be small → its unit, and how many of the cost's own unit make one
    "file": ("MB", 1e6),
    "memory": ("MB in memory", 1e6),
    "reading": ("ms to read a token of a prompt", 1e-3),
    "writing": ("ms to write a token", 1e-3),
}


def claim(answer: Answer) -> str:
    """The claim of a proven answer, in one sentence."""
    candidate, goal = answer.candidates[_proven(answer)], answer.goal
    size = megabytes(candidate.bytes)
    if goal.smallest != "file":
        value, unit = cost_of(answer, candidate.cost)
        size += f" and {number(value, 1)} {unit}"
    what = " of mean probability" if goal.measure == "probability" else ""
    names = list(answer.tests[0])
    where = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return (
        f"This model of {size} ({candidate.label}) loses less than {goal.lose_at_most:g} points{what} on "
        f"{'each of ' * (len(names) > 1)}{where}, with {100 * goal.confidence:g} % confidence."
    )


def cost_of(answer: Answer, cost: float) -> tuple[float, str]:
    """A candidate's cost in the unit that readers know, and that unit."""
    unit, size = _COSTS[answer.goal.smallest]
    return cost / size, unit


def certificate_of(answer: Answer, config: SmallestConfig, model: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate of a proven answer, as plain data; margins, losses and bounds of tests are shares, 0.03 for 3.

    `model` is what identifies the file, such as its name, bytes and SHA-256.

    Raises:
        ValueError: no candidate is proven.
    """
    place = _proven(answer)
    tested = list(zip(answer.order, answer.tests, strict=False))
    proof = dict(tested)[place]
    return {
        "format": _FORMAT,
        "claim": f"{claim(answer).removesuffix('.')}, compared with {answer.reference}.",
        "margin_points": answer.goal.lose_at_most,
        "measure": answer.goal.measure,
        "confidence": answer.goal.confidence,
        "level": next(iter(proof.values())).level,
        "opening": answer.opening,
        "reference": answer.reference,
        "benchmarks": {name: _outcome(test) for name, test in proof.items()},
        "sequence": [
            {
                "candidate": answer.candidates[number].label,
                "proven": is_proven(tests),
                "benchmarks": {name: _outcome(test) for name, test in tests.items()},
            }
            for number, tests in tested
        ],
        "sets": {
            name: {use: {"rows": one.rows, "sha256": one.digest} for use, one in sets.items()}
            for name, sets in answer.sets.items()
        },
        "scoring": {
            "metrics": {benchmark.name: headline_metric(benchmark) for benchmark in config.benchmarks},
            "template": config.prompts.template,
            "num_fewshot": config.scoring.num_fewshot,
        },
        "model": {"candidate": asdict(answer.candidates[place]), **model},
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def certificate_section(certificate: Mapping[str, Any]) -> str:
    """The section of the model card, in Markdown, about a certificate."""
    titles = ("rows", "both right", "only the reference", "only this model", "both wrong")
    columns = [Column(title) for title in (*titles, "loss", "largest loss not excluded", "p")]
    rows = []
    for name, test in certificate["benchmarks"].items():
        counts = [number(count, 0) for count in test["counts"].values()] if test["counts"] else ["–"] * 4
        figures = (lost(test["loss"]), lost(test["bound"], 2), p_value(test["p"]))
        rows.append(table_row(name, number(test["rows"], 0), *counts, *figures))
    table = Table((Column("benchmark", left=True), *columns), tuple(rows))
    return page_template("certificate.md.j2").render(certificate=certificate, table=table).strip()


def answer_card(answer: Answer, config: SmallestConfig, base: Base, checkpoint: Path, certificate: Any) -> str:
    """The model card of a proven answer: what it is made of, what it is proven to do, and how it was asked.

    `checkpoint` is what the model was made from, without its adapter.
    """
    candidate = answer.candidates[_proven(answer)]
    removed = f"{100 * candidate.ratio:.1f} % of all parameters are gone" if candidate.ratio else "Nothing is removed"
    which = ", all of them tokens that the job hardly needs" if candidate.trimmed else ""
    tuned = "An adapter is merged in" if candidate.tuned else "It has not been tuned"
    name = certificate["model"]["name"]
    made = f"Made from {base.hub or base.name}, {base.origin}. {removed}{which}. {tuned}."
    asked = [
        f"The prompt of {own.name}:\n\n```\n{prompt_of(config, own, candidate.tuned)}\n```" for own in config.benchmarks
    ]
    sections = [made, lost_words(checkpoint), certificate_section(certificate), *asked]
    tags = ["tailored-llama", *(["pruned"] if candidate.ratio else []), *(["gguf"] if candidate.type else [])]
    return write_card(name, [text for text in sections if text], base_model=base.hub, **base.licence, tags=tags)


def _outcome(test: LossTest) -> dict[str, Any]:
    return asdict(test) | {"loss": test.loss, "proven": test.proven}


def _proven(answer: Answer) -> int:
    if answer.proven is None:
        raise ValueError("no candidate is proven, so nothing can be claimed")
    return answer.proven
