"""Find the smallest model that still does a job, and prove that it does.

Three sets of rows never meet: those to tune on, those to choose candidates with, and those to prove the answer on. All
models come from the same stages as those of any other run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tailored_llama import data, evaluation, preflight
from tailored_llama.config import SmallestConfig, as_shown, bases_of
from tailored_llama.data import PromptSplit
from tailored_llama.errors import InputError, one_line
from tailored_llama.evaluation import Answer, LossTest, Measured, Proof, RowSet, Rung
from tailored_llama.pipeline import bases, candidates, stages
from tailored_llama.pipeline.answer import ShipSettings, SmallestSettings
from tailored_llama.pipeline.candidates import SearchState
from tailored_llama.pipeline.futures import Artifact, conclude, succeeded
from tailored_llama.pipeline.only import OnlyRunner
from tailored_llama.pipeline.publish import publish_answer
from tailored_llama.pipeline.rows import scored_rows
from tailored_llama.pipeline.runner import Runner
from tailored_llama.pipeline.stage import Stage, leaves
from tailored_llama.store import (
    ANSWER,
    ArtifactRef,
    ArtifactStore,
    check_published,
    check_target,
    place,
    record_opening,
)

S = TypeVar("S")

log = logging.getLogger(__name__)


def smallest(run: Runner, config: SmallestConfig) -> ArtifactRef:
    """Find the smallest model that loses no more than the goal allows, prove it, and export it with its certificate.

    Raises:
        InputError: the rows cannot prove what the goal asks for; or one stage alone is asked for.
        IncompleteRun: at the end, if a candidate could not be made, or the answer not be published.
    """
    if isinstance(run, OnlyRunner):
        raise InputError(f"only: got {run.only!r}; allowed: in the other flows, as a search goes by its stages' scores")
    started, margin = time.monotonic(), config.goal.lose_at_most / 100
    run = recorded = _Recorder(run)
    state = candidates.begin(run, config)
    measured = evaluation.search(candidates.ladders_of(state), partial(candidates.measure, state), margin)
    if not state.parts:
        raise next(iter(state.failed.values()))
    order = evaluation.sequence(measured, margin)
    if share := _discordant(state):
        needed = evaluation.rows_needed(margin, evaluation.level_of(1, config.goal.confidence), share)
        told = "in fewer bits the dense model differs on %.0f %% of the rows: about %d prove a model that loses nothing"
        log.info(told, 100 * share, needed)
    opening = _open(state, order) if order else None
    proving, tests = _prove(state, order, opening) if opening else ({}, [])
    answer, rungs = _answer(state, measured, order, tests, opening)
    parts = {rung: replace(state.parts[rung], proving=proving.get(rung, {})) for rung in rungs}
    dense = bases.score(run, state.bases[0], state.reference, "evaluation") if opening else {}
    report = run(
        stages.SMALLEST,
        SmallestSettings(as_shown(config), answer),
        "report",
        candidates=list(parts.values()),
        reference=dense,
        prompts=state.bases[0].prompts.evaluation if opening else {},
        used=[artifact for artifact in recorded.artifacts if succeeded(artifact)],
    )
    if answer.proven is not None:
        rung = rungs[answer.proven]
        _ship(state, answer, rung, Proof(state.bases[0].prompts.evaluation, dense, proving[rung]))
    log.info("the search took %.1f minutes", (time.monotonic() - started) / 60)
    failed = dict(state.failed)  # another candidate's failure takes nothing from what is proven
    if (target := config.store.publish) and succeeded(report):
        try:
            publish_answer(target, answer_folder(config) if answer.proven is not None else None)
        except Exception as error:
            failed["publish"] = error
    return conclude(report, failed)


class _Recorder:
    """Runs stages as another runner does, and keeps what they return, which tells what the search costs."""

    def __init__(self, run: Runner) -> None:
        self.run = run
        self.artifacts: list[Artifact] = []

    def __call__(self, stage: Stage[S], settings: S, name: str, /, **inputs: Any) -> Artifact:
        self.artifacts.append(artifact := self.run(stage, settings, name, **inputs))
        return artifact

    def open(self, artifact: Artifact) -> Path:
        return self.run.open(artifact)


def check_smallest(config: SmallestConfig) -> None:
    """Check a search before any work: each base model, its rows, and whether these can prove what the goal asks for.

    Raises:
        InputError: as `preflight_tailor`; or a type of file cannot be made; or there are too few rows to prove on.
    """
    for own in bases_of(config):
        update: dict[str, Any] = {"export": config.store.export or "smallest"}
        if config.goal.runtime == "llama.cpp":
            update["export_formats"] = tuple(f"gguf:{kind}" for kind in config.goal.types)
        preflight.preflight_tailor(own.model_copy(update={"store": own.store.model_copy(update=update)}))
    if target := answer_folder(config):
        check_target(target, "store.export", "an exported model", [ANSWER])
    if (published := config.store.publish) and not target:
        raise InputError(f"store.publish: got {published!r} without store.export; allowed: with a folder there")
    if published:
        check_published(published)
    goal = config.goal
    for benchmark in config.benchmarks:
        least, needed = _provable(config, rows := scored_rows(config, benchmark))
        if least > goal.lose_at_most and not goal.even_if_unprovable:
            of_file = ", two fifths of the file," if benchmark.data else ""
            raise InputError(
                f"goal.lose_at_most: got {goal.lose_at_most:g} with {rows:,} rows of {benchmark.name} to prove on; "
                f"allowed: at least {least:.1f} with these, about {needed:,} rows to prove on{of_file} for "
                f"{goal.lose_at_most:g}, or goal.even_if_unprovable = true to search all the same"
            )


def provable_lines(config: SmallestConfig) -> Iterator[str]:
    """What the rows of each benchmark can prove, before any work."""
    for benchmark in config.benchmarks:
        least, needed = _provable(config, rows := scored_rows(config, benchmark))
        yield (
            f"{benchmark.name}: {rows:,} rows to prove on. A model that loses nothing, but differs on "
            f"{100 * evaluation.DISCORDANT:.0f} % of them, is proven to lose less than {least:.1f} points once in two "
            f"times; for {config.goal.lose_at_most:g} points, {needed:,} rows to prove on do so four times in five."
        )


def _provable(config: SmallestConfig, rows: int) -> tuple[float, int]:
    """The margin in points that so many rows can prove, and the rows that the goal's own margin needs."""
    level = evaluation.level_of(1, config.goal.confidence)
    needed = evaluation.rows_needed(config.goal.lose_at_most / 100, level)
    return 100 * evaluation.provable_margin(rows, level), needed


def _open(state: SearchState, order: Sequence[Measured]) -> int:
    """Record what will be tested, and how, before the proving rows are scored; returns the number of the opening.

    The goal is what is proven with which rows: the rows and the base models, by their content. Another margin, measure
    or list of candidates is another plan for it.
    """
    goal, config = state.config.goal, state.config
    made_of = [(parts.checkpoint, parts.adapter, parts.choosing) for parts in (state.parts[one.rung] for one in order)]
    tested = [[part.result().key for _, part in leaves(parts)] for parts in made_of]
    plan = {"margin": goal.lose_at_most, "confidence": goal.confidence, "measure": goal.measure, "tested": tested}
    rows = sorted(sets["proving"].digest for sets in _sets(state).values())
    models = sorted(base.dense.checkpoint.result().digest for base in state.bases)
    store = ArtifactStore(config.store.root)
    opening = record_opening(store, _digest([rows, models])[:32], _digest(plan))
    level = evaluation.level_of(opening, goal.confidence)
    labels = "; ".join(state.label(one.rung) for one in order)
    log.info("opening %d of the proving rows: each test at level %.2g. In this order: %s", opening, level, labels)
    return opening


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _prove(
    state: SearchState, order: Sequence[Measured], opening: int
) -> tuple[dict[Rung, Mapping[str, Artifact]], list[Mapping[str, LossTest]]]:
    """Test the candidates in their order, on rows that chose none of them; the first that fails ends the sequence."""
    run, margin = state.run, state.config.goal.lose_at_most / 100
    level = evaluation.level_of(opening, state.config.goal.confidence)
    first = state.bases[0]
    reference = bases.score(run, first, state.reference, "evaluation")  # under way while the first candidate is scored
    proving: dict[Rung, Mapping[str, Artifact]] = {}
    tests: list[Mapping[str, LossTest]] = []
    for rung in (one.rung for one in order):
        base, kind, _ = state.locate(rung)
        proving[rung] = bases.score(run, base, state.model(rung), "evaluation", kind)
        dense = bases.read_all(run, first, reference, "evaluation")
        answers = bases.read_all(run, base, proving[rung], "evaluation")
        tests.append(
            {name: evaluation.noninferiority_test(dense[name], own, margin, level) for name, own in answers.items()}
        )
        proven = evaluation.is_proven(tests[-1])
        worst = max(tests[-1].values(), key=lambda test: test.bound)
        told = "is proven" if proven else "is not proven, which ends the sequence"
        lost, most = candidates.points_lost(worst.loss), round(100 * worst.bound, 1) + 0.0
        log.info("%s %s: it %s, and a loss of %.1f is not excluded", state.label(rung), told, lost, most)
        if not proven:
            break
    return proving, tests


def _answer(
    state: SearchState,
    measured: Mapping[Rung, Measured],
    order: Sequence[Measured],
    tests: Sequence[Mapping[str, LossTest]],
    opening: int | None,
) -> tuple[Answer, list[Rung]]:
    """The result, and the rungs of its candidates, those of the largest cost first; what could not be made is named."""
    rungs = sorted(state.parts, key=lambda rung: -measured[rung].cost)
    answer = Answer(
        goal=state.config.goal,
        reference=f"the dense {state.bases[0].shown}, {'tuned' if state.reference.adapter else 'as it is'}",
        candidates=[candidates.candidate_of(state, measured[rung]) for rung in rungs],
        order=[rungs.index(one.rung) for one in order],
        tests=tests,
        opening=opening,
        sets=_sets(state),
        nearest=rungs.index(evaluation.nearest(measured).rung),
        failed={name: error for base in state.bases for name, error in base.unreachable.items()}
        | {name: one_line(error) for name, error in state.failed.items()},
    )
    return answer, rungs


def _sets(state: SearchState) -> dict[str, dict[str, RowSet]]:
    """The three sets of rows of every benchmark, of the first base; all bases have the same."""
    base, sets = state.bases[0], dict[str, dict[str, RowSet]]()
    parts: dict[str, tuple[Mapping[str, Artifact], tuple[PromptSplit, ...]]] = {
        "tuning": (base.prompts.train, ("shots", "held_out")),
        "choosing": (base.choosing, ("selection",)),
        "proving": (base.prompts.evaluation, ("evaluation",)),
    }
    for purpose, (asked, splits) in parts.items():
        for name, folder in asked.items():
            rows = [row for split in splits for row in data.read_prompts(state.run.open(folder), split)]
            sets.setdefault(name, {})[purpose] = RowSet(len(rows), data.rows_digest(rows))
    return sets


def _discordant(state: SearchState) -> float | None:
    """The share of choosing rows on which the reference differs from itself in fewer bits."""
    for rung, parts in state.parts.items():
        base, _, step = state.locate(rung)
        if base is state.bases[0] and not step.ratio:
            answers = bases.read_all(state.run, base, parts.choosing, "selection")
            shares = [np.mean((state.answers[name].values - own.values) ** 2) for name, own in answers.items()]
            return float(np.mean(shares))
    return None


def _ship(state: SearchState, answer: Answer, rung: Rung, proof: Proof[Artifact]) -> None:
    """Write the proven model in the format of its runtime, with its certificate, to the folder of the exports."""
    parts, (base, kind, _) = state.parts[rung], state.locate(rung)
    shipped = state.run(
        stages.SHIPPED,
        ShipSettings(as_shown(base.config), answer, bases.answer_name(state.config)),
        "ship the answer",
        checkpoint=parts.checkpoint,
        adapter=parts.adapter,
        gguf=bases.gguf(state.run, base, state.model(rung), kind) if kind else None,
        proof=proof,
    )
    if target := answer_folder(state.config):
        place(state.run.open(shipped), target, "store.export", "an exported model", [ANSWER])


def answer_folder(config: SmallestConfig) -> Path | None:
    """The folder that the answer is exported to."""
    return Path(config.store.export).expanduser() / bases.answer_name(config) if config.store.export else None


def shipped(config: SmallestConfig, report: Path) -> list[Path]:
    """The folder of the proven model of a report, if there is one."""
    target = answer_folder(config)
    return [target] if target and evaluation.read_answer(report).proven is not None else []
