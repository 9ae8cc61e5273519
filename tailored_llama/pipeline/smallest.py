"""Find the smallest model that still does a job, and prove that it does.

Three sets of rows never meet: those to tune on, those to choose candidates with, and those to prove the answer on.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tailored_llama import evaluation, models, preflight, reports, serving, store
from tailored_llama.config import LLAMA_CPP, SmallestConfig, as_shown, bases_of, check_installed
from tailored_llama.errors import InputError, one_line
from tailored_llama.evaluation import HOPELESS, Answer, FileType, Ladder, Measured, Proof, Rung
from tailored_llama.pipeline import bases, candidates, stages, steps
from tailored_llama.pipeline.bases import Base
from tailored_llama.pipeline.candidates import Candidate
from tailored_llama.pipeline.executor import Cancelled, Executor
from tailored_llama.pipeline.graph import Graph, Node
from tailored_llama.pipeline.labelling import Labelling, ask_to_choose, check_labels, read_labelling
from tailored_llama.pipeline.proving import prove, row_sets
from tailored_llama.pipeline.publishing import publish_answer
from tailored_llama.pipeline.reporting import ShipSettings, SmallestSettings
from tailored_llama.pipeline.rows import check_labelled, check_provable

log = logging.getLogger(__name__)


@dataclass
class Search:
    """A search under way: the base models, its ladders, and the candidates that were tried, by rung.

    A file as it is has a ladder of one rung. The reference is the first base model, as it is or tuned.
    """

    run: Executor
    config: SmallestConfig
    bases: Sequence[Base]
    whole: Mapping[str, Candidate]  # by the base's source
    ladders: Sequence[tuple[Base, FileType]]
    labelling: Labelling | None  # of rows without an answer, if there are any
    tried: dict[Rung, Candidate] = field(default_factory=dict)
    failed: dict[str, Exception] = field(default_factory=dict)

    def begin(self, rung: Rung) -> Candidate:
        """The candidate of a rung, before anything of it is known."""
        base, kind = self.ladders[rung.ladder]
        return candidates.make(base, base.steps[rung.position], kind, self.whole[base.given])

    @property
    def reference(self) -> Candidate:
        return self.whole[self.bases[0].given]


def smallest(run: Executor, config: SmallestConfig) -> Graph:
    """Find the smallest model that loses no more than the goal allows, prove it, and export it with its certificate.

    Raises:
        InputError: a benchmark has too few rows to choose with; or the file of labels has what was not asked for.
        WaitingForLabels: as `ask_to_choose` and `prove`.
    """
    margin = config.goal.tested_margin
    search = start(run, config)
    if doubt := candidates.doubt(run, search.reference):
        log.warning(doubt)
    measured = evaluation.search(_ladders(search), partial(measure, search), margin)
    if not search.tried:
        raise next(iter(search.failed.values()))
    order, base = evaluation.sequence(measured, margin), search.bases[0]
    if (labelling := search.labelling) and config.goal.ask:
        near = [tried for rung, tried in search.tried.items() if measured[rung].smoothed <= HOPELESS * margin]
        ask_to_choose(run, labelling, search.reference, near)
    passing = [search.tried[one.rung] for one in order]
    proving = prove(run, search.bases, search.reference, passing, labelling) if passing else None
    rungs = sorted(search.tried, key=lambda rung: -measured[rung].cost)
    unreachable = {name: error for own in search.bases for name, error in own.unreachable.items()}
    answer = Answer(
        goal=config.goal,
        reference=f"the dense {base.name}, {'tuned' if search.reference.adapter else 'as it is'}",
        candidates=[replace(search.tried[rung].measured, smoothed=measured[rung].smoothed) for rung in rungs],
        order=[rungs.index(one.rung) for one in order],
        tests=proving.tests if proving else [],
        opening=proving.opening if proving else None,
        sets=proving.sets if proving else row_sets(run, base),
        nearest=rungs.index(evaluation.nearest(measured).rung),
        record=proving.record if proving else "",
        failed=unreachable | {name: one_line(error) for name, error in search.failed.items()},
        labels=proving.labels if proving else {},
        doubt=doubt,
    )
    succeeded = {str(run.result(node).key): node for node in run.begun() if not run.failures(node)}
    used = [succeeded[key] for key in sorted(succeeded)]  # in the same order, whatever executes the search
    report = stages.smallest(
        "report",
        settings=SmallestSettings(as_shown(config), answer),
        proofs=proving.proofs if proving else [],
        used=used,
    )
    exports = {}
    if proving and answer.proven is not None and (target := answer_folder(config)):
        place = answer.order.index(answer.proven)
        exports = {target: _shipped(run, proving.tested[place], answer, proving.proofs[place])}
    publish = None
    if published := config.store.publish:
        publish = partial(publish_answer, published, answer_folder(config) if exports else None)
    return Graph(report, exports=exports, publish=publish, failed=search.failed)


def start(run: Executor, config: SmallestConfig) -> Search:
    """Prepare the base models, and choose the reference: the better of the dense model as it is and tuned.

    The choosing rows decide. A file that llama.cpp can serve as it is comes first, then ladders of many bits: what
    loses too much there need not be tried in fewer.
    """
    run.foresee([bases.foreseen(own) for own in bases_of(config)])
    if config.goal.runtime == "llama.cpp":
        for own in bases_of(config):  # of a model on the Hub, the architecture is known once it is here
            _check_known(models.read_config(run.open(steps.load_dense(own)))["model_type"])
    prepared = [bases.prepare(run, own) for own in bases_of(config)]
    is_served = any(serving.is_converted(run.open(base.dense.checkpoint)) for base in prepared)
    prepared = [replace(base, is_served=is_served) for base in prepared]
    whole = {base.given: candidates.better_whole(run, base) for base in prepared}
    ladders: list[tuple[Base, FileType]] = []
    if config.goal.runtime == "llama.cpp":
        ladders += [(base, "source") for base in prepared if base.source.kind in ("wheel", "gguf")]
    kinds = sorted(config.file_types, key=serving.bits_of, reverse=True)
    ladders += [(base, kind) for kind in kinds for base in prepared]
    labelling = read_labelling(run, prepared[0]) if config.benchmarks[0].unlabelled else None
    return Search(run, config, prepared, whole, ladders, labelling)


def measure(search: Search, rungs: Sequence[Rung]) -> list[Measured]:
    """Make the candidates of rungs side by side, and measure what they cost and lose on the choosing rows.

    One that cannot be made loses everything.
    """
    run, reference = search.run, search.reference
    labels = search.labelling.labels if search.labelling else {}
    under_way = {rung: search.begin(rung) for rung in rungs}
    run.begin([(own.checkpoint, own.adapter) for own in under_way.values()])  # of all, before one is waited for
    for phase in (partial(candidates.score, run), partial(candidates.cost, run, reference=reference, labels=labels)):
        for rung, candidate in list(under_way.items()):
            try:
                under_way[rung] = phase(candidate)
                run.begin(under_way[rung].choosing, under_way[rung].timed)
            except Cancelled:
                raise
            except Exception as error:
                log.warning("%s: %s", candidate.label, one_line(error))
                search.failed[candidate.label] = error
                del under_way[rung]
    for rung, candidate in under_way.items():
        search.tried[rung] = candidate
        _tell(search, rung)
    figures = {rung: candidate.measured for rung, candidate in under_way.items()}
    return [
        Measured(rung, figures[rung].cost, figures[rung].loss) if rung in figures else Measured(rung, math.inf, 1.0)
        for rung in rungs
    ]


def _tell(search: Search, rung: Rung) -> None:
    """Log what a candidate costs and loses, and which is the smallest so far."""
    margin, candidate = search.config.goal.tested_margin, search.tried[rung]
    passing = [own for own in search.tried.values() if own.measured.loss <= margin]
    best = min(passing, key=lambda own: own.measured.cost, default=None)
    progress = f"candidate {len(search.tried)}, on ladder {rung.ladder + 1} of {len(search.ladders)}"
    figures = f"{reports.points_lost(candidate.measured.loss)}, {candidate.measured.bytes / 1e6:.1f} MB"
    smallest_so_far = best.label if best else "none"
    log.info("%s: %s %s; smallest so far: %s", progress, candidate.label, figures, smallest_so_far)


def check_smallest(config: SmallestConfig) -> None:
    """Check a search before any work: each base model, its rows, where the answer goes, and what the rows can prove.

    Raises:
        InputError: as `check_labelled`, `preflight` and `check_provable`; llama.cpp is not installed; or the answer
            cannot be exported or published.
    """
    check_labelled(config)
    if config.goal.runtime == "llama.cpp":
        for package in LLAMA_CPP:
            check_installed(package, "goal.runtime: got 'llama.cpp'", "transformers")
        for own in bases_of(config):
            _check_known(models.source_architecture(models.find_model(own.model)))
    for own in bases_of(config):
        preflight.preflight(own)
    if target := answer_folder(config):
        preflight.check_folder("store.export", str(config.store.export))
        store.check_target(target, "store.export", "an exported model", [store.ANSWER])
    if published := config.store.publish:
        if not target:
            raise InputError(f"store.publish: got {published!r} without store.export; allowed: with a folder there")
        store.check_published(published)
    if any(benchmark.unlabelled for benchmark in config.benchmarks):
        check_labels(config)
    check_provable(config)


def _check_known(architecture: str | None) -> None:
    """Check that llama.cpp has an architecture, if one is known."""
    if architecture and not models.family_of(architecture).gguf:
        got = f"got 'llama.cpp' for architecture {architecture}, which llama.cpp lacks"
        raise InputError(f"goal.runtime: {got}; allowed: transformers or vllm")


def _ladders(search: Search) -> list[Ladder]:
    """The ladders with the cost of every rung, as far as it can be told before the model is made.

    Bytes follow from the parameters, and memory is hardly more. Times cannot be told.
    """
    told = search.config.goal.smallest in ("file", "memory")
    ladders: list[Ladder] = []
    for base, kind in search.ladders:
        if kind == "source":  # it is measured in any case
            ladders.append(Ladder((0.0,)))
            continue
        structure = models.read_structure(search.run.open(base.dense.checkpoint))
        whole = structure.parameters * serving.bits_of(kind) / 8
        costs = tuple(whole * (1 - step.ratio) if told else 0.0 for step in base.steps)
        before = enumerate(search.ladders[: len(ladders)])
        above = max((i for i, (other, known) in before if other is base and known != "source"), default=None)
        reference = base is search.bases[0] and serving.bits_of(kind) >= 16
        ladders.append(Ladder(costs, reference, above))
    return ladders


def _shipped(run: Executor, candidate: Candidate, answer: Answer, proof: Proof[Any]) -> Node:
    """The proven model in the format of its runtime, with its certificate."""
    base = candidate.base
    answer = replace(answer, sets=row_sets(run, base))
    return stages.shipped(
        "ship the answer",
        settings=ShipSettings(as_shown(base.config), answer, candidates.answer_name(base.config)),
        checkpoint=candidate.checkpoint,
        adapter=candidate.adapter,
        gguf=candidates.gguf(candidate) if candidate.kind else None,
        prompts=base.prompts.of_chat(*base.prompts.evaluation),
        proof=proof,
    )


def answer_folder(config: SmallestConfig) -> Path | None:
    """The folder that the answer is exported to."""
    return Path(config.store.export).expanduser() / candidates.answer_name(config) if config.store.export else None


def shipped(config: SmallestConfig, report: Path) -> list[Path]:
    """The folder of the proven model of a report, if there is one."""
    target = answer_folder(config)
    return [target] if target and evaluation.read_answer(report).proven is not None else []
