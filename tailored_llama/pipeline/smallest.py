"""Find the smallest model that still does a job, and prove that it does.

Three sets of rows never meet: those to tune on, those to choose candidates with, and those to prove the answer on.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tailored_llama import data, evaluation, models, preflight, serving, store
from tailored_llama.config import SmallestConfig, as_shown, bases_of, check_installed
from tailored_llama.data import PromptSplit
from tailored_llama.errors import InputError, one_line
from tailored_llama.evaluation import Answer, Ladder, LossTest, Measured, Proof, RowSet, Rung
from tailored_llama.pipeline import candidates, stages
from tailored_llama.pipeline.futures import Artifact, failures, report_or_raise
from tailored_llama.pipeline.only import OnlyRunner
from tailored_llama.pipeline.proven import publish_answer
from tailored_llama.pipeline.reporting import ShipSettings, SmallestSettings
from tailored_llama.pipeline.rows import check_provable
from tailored_llama.pipeline.runner import Runner
from tailored_llama.pipeline.search_state import Base, SearchState
from tailored_llama.pipeline.stage import Stage, flatten
from tailored_llama.store import ArtifactRef

S = TypeVar("S")
Sets = dict[str, dict[str, RowSet]]  # by benchmark and purpose

log = logging.getLogger(__name__)


def smallest(run: Runner, config: SmallestConfig) -> ArtifactRef:
    """Find the smallest model that loses no more than the goal allows, prove it, and export it with its certificate.

    Raises:
        InputError: one stage alone is asked for; or a benchmark has too few rows to choose with.
        IncompleteRun: at the end, if a candidate could not be made, or the answer not be published.
    """
    if isinstance(run, OnlyRunner):
        raise InputError(f"only: got {run.only!r}; allowed: in the other flows, as a search goes by its stages' scores")
    run = recorded = _Recorder(run)
    margin = config.goal.lose_at_most / 100
    state = candidates.start_search(run, config)
    measured = evaluation.search(_ladders(state), partial(candidates.measure, state), margin)
    if not state.parts:
        raise next(iter(state.failed.values()))
    order, sets, base = evaluation.sequence(measured, margin), _sets(state, state.bases[0]), state.bases[0]
    if share := _discordant(state):
        needed = evaluation.rows_needed(margin, evaluation.level_of(1, config.goal.confidence), share)
        told = "in fewer bits the dense model differs on %.0f %% of the rows: proving no loss then takes about %d rows"
        log.info(told, 100 * share, needed)
    opening, record = _open(state, order, sets) if order else (None, "")
    proving, tests = _prove(state, order, opening) if opening else ({}, [])
    rungs = sorted(state.candidates, key=lambda rung: -measured[rung].cost)
    unreachable = {name: error for own in state.bases for name, error in own.unreachable.items()}
    answer = Answer(
        goal=config.goal,
        reference=f"the dense {base.name}, {'tuned' if state.reference.adapter else 'as it is'}",
        candidates=[replace(state.candidates[rung], smoothed=measured[rung].smoothed) for rung in rungs],
        order=[rungs.index(one.rung) for one in order],
        tests=tests,
        opening=opening,
        sets=sets,
        nearest=rungs.index(evaluation.nearest(measured).rung),
        record=record,
        failed=unreachable | {name: one_line(error) for name, error in state.failed.items()},
        doubt=state.doubt,
    )
    dense = candidates.score(run, base, state.reference, "evaluation") if opening else {}
    prompts = base.prompts.evaluation if opening else {}
    report = run(
        stages.SMALLEST,
        SmallestSettings(as_shown(config), answer),
        "report",
        candidates=[replace(state.parts[rung], proving=proving.get(rung, {})) for rung in rungs],
        reference=dense,
        prompts=prompts,
        used=[artifact for artifact in recorded.artifacts if not failures(artifact)],
    )
    if answer.proven is not None:
        rung = rungs[answer.proven]
        _ship(state, answer, rung, Proof(prompts, dense, proving[rung]))
    failed = dict(state.failed)  # another candidate's failure takes nothing from what is proven
    if (target := config.store.publish) and not failures(report):
        try:
            publish_answer(target, answer_folder(config) if answer.proven is not None else None)
        except Exception as error:
            failed["publish"] = error
    return report_or_raise(report, failed)


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
    """Check a search before any work: each base model, its rows, where the answer goes, and what the rows can prove.

    Raises:
        InputError: as `preflight_tailor` and `check_provable`; llama.cpp is not installed; or the answer cannot be
            exported or published.
    """
    if config.goal.runtime == "llama.cpp":
        for package in ("llama_cpp_py_sync", "xllamacpp"):
            check_installed(package, "goal.runtime: got 'llama.cpp'", "transformers", "gguf")
    for own in bases_of(config):
        update: dict[str, Any] = {"export": config.store.export or "smallest"}
        if config.goal.runtime == "llama.cpp":
            update["export_formats"] = tuple(f"gguf:{kind}" for kind in config.goal.types)
        preflight.preflight_tailor(own.model_copy(update={"store": own.store.model_copy(update=update)}))
    if target := answer_folder(config):
        store.check_target(target, "store.export", "an exported model", [store.ANSWER])
    if published := config.store.publish:
        if not target:
            raise InputError(f"store.publish: got {published!r} without store.export; allowed: with a folder there")
        store.check_published(published)
    check_provable(config)


def _ladders(state: SearchState) -> list[Ladder]:
    """The ladders with the cost of every rung, as far as it can be told before the model is made.

    Bytes follow from the parameters, and memory is hardly more. Times cannot be told.
    """
    told = state.config.goal.smallest in ("file", "memory")
    ladders: list[Ladder] = []
    for base, kind in state.ladders:
        if kind == "source":  # it is measured in any case
            ladders.append(Ladder((0.0,)))
            continue
        structure = models.read_structure(state.run.open(base.dense.checkpoint))
        whole = structure.parameters * serving.bits_of(kind) / 8
        costs = tuple(whole * (1 - step.ratio) if told else 0.0 for step in base.steps)
        before = enumerate(state.ladders[: len(ladders)])
        above = max((i for i, (other, known) in before if other is base and known != "source"), default=None)
        reference = base is state.bases[0] and serving.bits_of(kind) >= 16
        ladders.append(Ladder(costs, reference, above))
    return ladders


def _discordant(state: SearchState) -> float | None:
    """The share of choosing rows on which the reference differs from itself in fewer bits."""
    for rung, parts in state.parts.items():
        base, kind, step = state.locate(rung)
        if base is state.bases[0] and not step.ratio and kind != "source":
            answers = candidates.read_all(state.run, base, parts.choosing, "selection")
            return float(
                np.mean([np.mean((state.answers[name].values - own.values) ** 2) for name, own in answers.items()])
            )
    return None


def _open(state: SearchState, order: Sequence[Measured], sets: Sets) -> tuple[int, str]:
    """Record what will be tested, and how, before the proving rows are scored.

    Returns the number of the opening, and where it is recorded.

    Rows and base models are known by their content. Another margin, measure or list of candidates is another plan.
    """
    goal, config = state.config.goal, state.config
    made_of = [(parts.checkpoint, parts.adapter, parts.choosing) for parts in (state.parts[one.rung] for one in order)]
    tested = [[part.result().key for _, part in flatten(parts)] for parts in made_of]
    plan = {"margin": goal.lose_at_most, "confidence": goal.confidence, "measure": goal.measure, "tested": tested}
    rows = sorted(own["proving"].digest for own in sets.values())
    dense = sorted(base.dense.checkpoint.result().digest for base in state.bases)
    artifacts = store.ArtifactStore(config.store.root)
    opening, record = store.record_opening(artifacts, _digest([rows, dense])[:32], _digest(plan))
    level = evaluation.level_of(opening, goal.confidence)
    labels = "; ".join(state.label(one.rung) for one in order)
    log.info("opening %d of the proving rows: each test at level %.2g. In this order: %s", opening, level, labels)
    return opening, record


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _prove(
    state: SearchState, order: Sequence[Measured], opening: int
) -> tuple[dict[Rung, Mapping[str, Artifact]], list[Mapping[str, LossTest]]]:
    """Test the candidates in their order, on rows that chose none of them; the first that fails ends the sequence."""
    run, first, goal = state.run, state.bases[0], state.config.goal
    level = evaluation.level_of(opening, goal.confidence)
    # It is under way while the first candidate is scored.
    reference = candidates.score(run, first, state.reference, "evaluation")
    proving: dict[Rung, Mapping[str, Artifact]] = {}
    tests: list[Mapping[str, LossTest]] = []
    for rung in (one.rung for one in order):
        base, kind, _ = state.locate(rung)
        proving[rung] = candidates.score(run, base, state.models[state.model_key(rung)], "evaluation", kind)
        dense = candidates.read_all(run, first, reference, "evaluation")
        small = candidates.read_all(run, base, proving[rung], "evaluation")
        tested = {
            name: evaluation.noninferiority_test(dense[name], own, goal.lose_at_most / 100, level)
            for name, own in small.items()
        }
        tests.append(tested)
        proven, worst = evaluation.is_proven(tested), max(tested.values(), key=lambda test: test.bound)
        told = "is proven" if proven else "is not proven, which ends the sequence"
        lost, most = candidates.points_lost(worst.loss), round(100 * worst.bound, 1) + 0.0  # no minus zero
        log.info("%s %s: it %s, and a loss of %.1f is not excluded", state.label(rung), told, lost, most)
        if not proven:
            break
    return proving, tests


def _sets(state: SearchState, base: Base) -> Sets:
    """The three sets of rows of every benchmark, as a base is asked; all bases have the same rows."""
    sets = Sets()
    parts: dict[str, tuple[Mapping[str, Artifact], tuple[PromptSplit, ...]]] = {
        "tuning": (base.prompts.shots, ("shots", "held_out")),
        "choosing": (base.rows["selection"], ("selection",)),
        "proving": (base.prompts.evaluation, ("evaluation",)),
    }
    for purpose, (asked, splits) in parts.items():
        for name, folder in asked.items():
            rows = [row for split in splits for row in data.read_prompts(state.run.open(folder), split)]
            sets.setdefault(name, {})[purpose] = RowSet(len(rows), data.rows_digest(rows))
    return sets


def _ship(state: SearchState, answer: Answer, rung: Rung, proof: Proof[Artifact]) -> None:
    """Write the proven model in the format of its runtime, with its certificate, to the folder of the exports."""
    parts, (base, kind, _) = state.parts[rung], state.locate(rung)
    gguf = candidates.gguf(state.run, base, state.models[state.model_key(rung)], kind) if kind else None
    asked = base.prompts.of_chat(*base.prompts.evaluation)
    model = {"parts": parts, "gguf": gguf, "prompts": asked}
    answer = replace(answer, sets=_sets(state, base))
    settings = ShipSettings(as_shown(base.config), answer, candidates.answer_name(state.config))
    shipped = state.run(stages.SHIPPED, settings, "ship the answer", **model, proof=proof)
    if target := answer_folder(state.config):
        store.place(state.run.open(shipped), target, "store.export", "an exported model", [store.ANSWER])


def answer_folder(config: SmallestConfig) -> Path | None:
    """The folder that the answer is exported to."""
    return Path(config.store.export).expanduser() / candidates.answer_name(config) if config.store.export else None


def shipped(config: SmallestConfig, report: Path) -> list[Path]:
    """The folder of the proven model of a report, if there is one."""
    target = answer_folder(config)
    return [target] if target and evaluation.read_answer(report).proven is not None else []
