"""The last stages of a search for the smallest model: the model with its certificate, and the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tailored_llama import data, evaluation, models, reports, serving
from tailored_llama.config import SmallestConfig, Work, named_benchmark
from tailored_llama.data import PromptSplit
from tailored_llama.evaluation import Answer, Answers, CandidateParts, Proof
from tailored_llama.pipeline.reporting import shown_identity
from tailored_llama.pipeline.stage import plain
from tailored_llama.store import MANIFEST, read_manifest, sha256_file, write_table

CERTIFICATE, PROOF = "certificate.json", "proof.parquet"
PROOF_SCHEMA = pa.schema(
    {
        "benchmark": pa.string(),
        "example": pa.int32(),
        "dense": pa.float64(),  # 1 where the answer is right, or the probability of the right choice
        "small": pa.float64(),
    }
)
MOST_LOST = 10  # rows that the page shows


@dataclass(frozen=True)
class SmallestSettings:
    """The configuration of a search, and what it found."""

    config: SmallestConfig
    answer: Answer


def write_smallest_report(
    *,
    candidates: Sequence[CandidateParts[Path]],
    reference: Mapping[str, Path],
    prompts: Mapping[str, Path],
    used: Sequence[Path],
    settings: SmallestSettings,
    work: Work,
) -> None:
    """Stage: write the page of a search.

    Args:
        candidates: all that were measured, in the order of the answer.
        reference: the reference's scores on the proving rows by benchmark; none if these were not opened.
        prompts: the proving rows by benchmark.
        used: the artifacts of the search, each as often as it was asked for.
    """
    answer, place = settings.answer, settings.answer.proven
    tested = answer.order[0] if place is None and answer.order else place
    lost = [] if tested is None else _lost(settings.config, candidates[tested].proving, reference, prompts)
    costs = [read_manifest(folder) for folder in dict.fromkeys(used)]
    reports.write_smallest(settings.config, answer, lost, costs, out=work.out)


def _lost(
    config: SmallestConfig, small: Mapping[str, Path], dense: Mapping[str, Path], prompts: Mapping[str, Path]
) -> list[tuple[str, str]]:
    """Rows that only the dense model gets right, an equal number of each benchmark: its name, and the row as text."""
    rows = []
    for name, folder in small.items():
        metric = data.headline_metric(named_benchmark(config, name))
        before, after = (evaluation.read_answers(own, metric) for own in (dense[name], folder))
        asked = {prompt.example: prompt for prompt in data.read_prompts(prompts[name], "evaluation")}
        chosen = evaluation.read_chosen(folder, metric)
        only_dense = [
            int(example)
            for example, had, has in zip(before.examples, before.values, after.values, strict=True)
            if had == 1 and has != 1
        ]
        for example in only_dense[: -(-MOST_LOST // len(small))]:
            prompt, said = asked[example], chosen[example]
            wrong = prompt.continuations[said] if isinstance(said, int) else said
            right = prompt.continuations[prompt.answer]
            text = f"{prompt.contexts[prompt.answer]}\n\nright: {right.strip()}\nchosen: {wrong.strip()}"
            rows.append((name, text))
    return rows


@dataclass(frozen=True)
class ShipSettings:
    """What the shipped model depends on, beside its weights and scores: its base's search, what was found, its name."""

    config: SmallestConfig
    answer: Answer
    name: str

    def identity(self) -> dict[str, Any]:
        return shown_identity(self.config) | {"answer": plain(self.answer), "name": self.name}


def ship_model(
    *, checkpoint: Path, adapter: Path | None, gguf: Path | None, proof: Proof[Path], settings: ShipSettings, work: Work
) -> dict[str, Any]:
    """Stage: write the proven model in the format of its runtime, with card, `certificate.json` and `proof.parquet`.

    A GGUF file is the one that was scored. A checkpoint has the base model's own 16 bits.

    Args:
        checkpoint: the candidate's.
        adapter: to merge in.
        gguf: the folder of the candidate's GGUF file; None: a checkpoint is shipped.
        proof: what proves it.
    """
    answer, name, out = settings.answer, settings.name, work.out
    assert answer.proven is not None
    base = models.base_of(models.find_model(settings.config.model))
    if gguf:
        shutil.copytree(gguf, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
    else:
        models.merge_adapter(checkpoint, adapter, out=out, half=base.half)
    files = [serving.gguf_file(out)] if gguf else models.weight_files(out)
    size = sum(own.stat().st_size for own in files)
    facts = {"name": name, "bytes": size, "sha256": {own.name: sha256_file(own) for own in files}}
    certificate = reports.certificate_of(answer, settings.config, facts) | {"run": settings.identity()["config"]}
    (out / CERTIFICATE).write_text(json.dumps(certificate, indent=1) + "\n")
    card = reports.answer_card(answer, settings.config, base, checkpoint, certificate)
    (out / models.CARD).write_text(card, encoding="utf-8")
    _write_proof(settings.config, proof, out)
    return {"bytes": size}


def _write_proof(config: SmallestConfig, proof: Proof[Path], out: Path) -> None:
    columns: dict[str, list[Any]] = {name: [] for name in PROOF_SCHEMA.names}
    for name, prompts in proof.prompts.items():
        before, after = (answers_of(config, name, own[name], prompts) for own in (proof.dense, proof.small))
        columns["benchmark"] += [name] * len(before.examples)
        columns["example"] += before.examples.tolist()
        columns["dense"] += before.values.tolist()
        columns["small"] += after.values.tolist()
    write_table(out / PROOF, columns, PROOF_SCHEMA)


def answers_of(
    config: SmallestConfig, name: str, scores: Path, prompts: Path, split: PromptSplit = "evaluation"
) -> Answers:
    """The answers of a scored model on a benchmark, valued as the goal measures them."""
    metric = data.headline_metric(named_benchmark(config, name))
    if config.goal.measure == "probability":
        return evaluation.read_probabilities(scores, prompts, split, metric)
    return evaluation.read_answers(scores, metric)
