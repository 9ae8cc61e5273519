"""The proof of a search: what is tested is written down, then candidates are tested in turn, the safest first.

Where the rows to prove on have no labels, these are asked for at planned looks, and only for rows that the candidate
under test and the reference answer differently.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tailored_llama import data, evaluation, reports, store
from tailored_llama.data import Asked, PromptSplit
from tailored_llama.evaluation import Look, LossTest, Proof, RowSet
from tailored_llama.pipeline import candidates, steps
from tailored_llama.pipeline.answers import Labels, compared
from tailored_llama.pipeline.bases import Base
from tailored_llama.pipeline.candidates import Candidate
from tailored_llama.pipeline.executor import Executor
from tailored_llama.pipeline.graph import Artifact, Artifacts, nodes_in
from tailored_llama.pipeline.labelling import Labelling

Sets = dict[str, dict[str, RowSet]]  # by benchmark and purpose
Looks = Mapping[str, Sequence[Look]]  # by benchmark

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proving:
    """What was tested, on which rows, with what result.

    `tested` are the candidates of the tests, and `proofs` the rows and the scores behind each test, in the same order.
    `labels` are those of rows that had none before.
    """

    opening: int
    record: str
    sets: Sets
    tested: Sequence[Candidate]
    tests: Sequence[Mapping[str, LossTest]]
    proofs: Sequence[Proof[Artifact]]
    labels: Labels = field(default_factory=dict)


def prove(
    run: Executor, bases: Sequence[Base], reference: Candidate, order: Sequence[Candidate], labelling: Labelling | None
) -> Proving:
    """Open the proving rows, and test candidates on them in their order; the first that fails ends the sequence.

    `labelling` is None if all rows have an answer.

    Raises:
        WaitingForLabels: more labels may prove the candidate whose turn it is.
    """
    config = bases[0].config
    # The plan has the rows of a first opening, since it decides which opening this is. Those of a later one follow.
    opening, record = _open(run, bases, order, _planned_rows(run, reference, order) if labelling else None)
    level = evaluation.level_of(opening, config.goal.confidence)
    if labelling:
        asked = _planned_rows(run, reference, order, level)
        of = {base.given: _limited(base, asked) for base in bases}
        reference = replace(reference, base=of[reference.base.given])
        order = [replace(candidate, base=of[candidate.base.given]) for candidate in order]
    names = "; ".join(candidate.label for candidate in order)
    log.info("opening %d of the proving rows: each test at level %.2g. In this order: %s", opening, level, names)
    before, prompts = candidates.scores(reference, "evaluation"), reference.base.rows["evaluation"]
    looks = dict[str, Sequence[Look]]()  # at the proving rows of each benchmark
    for name, rows in prompts.items() if labelling else ():
        count = len(data.read_prompts(run.open(rows), "evaluation"))
        looks[name] = evaluation.plan_looks(count, config.goal.tested_margin, level)
    tests, proofs = list[Mapping[str, LossTest]](), list[Proof[Artifact]]()
    for candidate in order:
        after = candidates.scores(candidate, "evaluation")
        run.begin(before, after)
        tested, missing = _test(run, reference.base, before, after, level, labelling, looks)
        if labelling and missing and config.goal.ask and all(t.proven or t.missing for t in tested.values()):
            raise labelling.ask(missing, _purpose(candidate, missing, order[: len(tests)]))
        tests.append(tested)
        proofs.append(Proof(prompts, before, after))
        _tell(candidate, tested)
        if not evaluation.is_proven(tested):
            break
    sets, labels = row_sets(run, reference.base), labelling.labels if labelling else {}
    return Proving(opening, record, sets, order[: len(tests)], tests, proofs, labels)


def _purpose(candidate: Candidate, missing: Sequence[Asked], proven: Sequence[Candidate]) -> str:
    """Say what labels are asked for, and what is proven without them."""
    lost, first = reports.points_lost(candidate.measured.loss), sum(row.part == missing[0].part for row in missing)
    figures = f"{candidate.measured.bytes / 1e6:.1f} MB, {lost} on the choosing rows"
    so_far = f"; proven so far is {proven[-1].label}, which goal.ask = false takes" if proven else ""
    return f"to prove {candidate.label} ({figures}), {first} of them first{so_far}"


def _tell(candidate: Candidate, tested: Mapping[str, LossTest]) -> None:
    proven, worst = evaluation.is_proven(tested), max(tested.values(), key=lambda test: test.bound)
    told = "is proven" if proven else "is not proven, which ends the sequence"
    lost, most = reports.points_lost(worst.loss), round(100 * worst.bound, 1) + 0.0  # no minus zero
    log.info("%s %s: it %s, and a loss of %.1f is not excluded", candidate.label, lost, told, most)


def row_sets(run: Executor, base: Base) -> Sets:
    """The three sets of rows of every benchmark, as a base is asked; all bases have the same rows."""
    sets = Sets()
    parts: dict[str, tuple[Artifacts, tuple[PromptSplit, ...]]] = {
        "tuning": (base.prompts.train, ("shots", "held_out")),
        "choosing": (base.rows["selection"], ("selection",)),
        "proving": (base.rows["evaluation"], ("evaluation",)),
    }
    for purpose, (asked, splits) in parts.items():
        for name, folder in asked.items():
            rows = [row for split in splits for row in data.read_prompts(run.open(folder), split)]
            sets.setdefault(name, {})[purpose] = RowSet(len(rows), data.rows_digest(rows))
    return sets


def _open(run: Executor, bases: Sequence[Base], order: Sequence[Candidate], asked: int | None) -> tuple[int, str]:
    """Record what will be tested, and how, before the proving rows are scored.

    Returns the number of the opening, and where it is recorded.

    Rows and base models are known by their content. Another margin, number of rows that are looked at or list
    of candidates is another plan.
    """
    goal, root = bases[0].config.goal, bases[0].config.store.root
    made_of = [(own.checkpoint, own.adapter, own.choosing) for own in order]
    tested = [[run.result(node).key for node in nodes_in(parts)] for parts in made_of]
    plan = {"margin": goal.lose_at_most, "confidence": goal.confidence, "tested": tested}
    plan["measure"] = "accuracy"  # as in the records of earlier versions, so that the same plan is not opened again
    if asked:
        plan["rows"] = asked
    if goal.label_errors:
        plan["label_errors"] = goal.label_errors
    rows = sorted(own["proving"].digest for own in row_sets(run, bases[0]).values())
    dense = sorted(run.result(node).digest for base in bases for node in nodes_in(base.dense.checkpoint))
    run.commit()
    return store.record_opening(store.ArtifactStore(root), _digest([rows, dense])[:32], _digest(plan))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _planned_rows(run: Executor, reference: Candidate, order: Sequence[Candidate], level: float | None = None) -> int:
    """How many rows to look at: enough for the candidate that differs most from the reference on the choosing rows.

    None: at the level of a first opening.
    """
    config, needed = reference.base.config, 0
    margin, power = config.goal.tested_margin, evaluation.POWER ** (1 / len(config.benchmarks))
    level = level or evaluation.level_of(1, config.goal.confidence)
    first = reference.said(run)
    for candidate in order:
        for name, own in candidate.said(run).items():
            share = (int(np.sum(own.answers != first[name].answers)) + 1) / (len(own.answers) + 2)  # never nothing
            needed = max(needed, evaluation.rows_to_prove(margin, level, share, power))
    return min(needed, max(own["proving"].rows for own in row_sets(run, reference.base).values()))


def _limited(base: Base, rows: int) -> Base:
    """A base that is asked so many of its proving rows, evenly spaced in the order of their hashes."""
    config = base.config.model_copy(update={"scoring": base.config.scoring.model_copy(update={"limit": rows})})
    asked = steps.render_all(config).evaluation
    return replace(
        base,
        config=config,
        prompts=replace(base.prompts, evaluation=asked),
        rows={"selection": base.rows["selection"], "evaluation": asked},
    )


def _test(
    run: Executor,
    base: Base,
    before: Artifacts,
    after: Artifacts,
    level: float,
    labelling: Labelling | None,
    looks: Looks,
) -> tuple[dict[str, LossTest], list[Asked]]:
    """Test a candidate on every benchmark; also the rows whose labels may still prove it, by their parts.

    `base` is that of the reference; `before` and `after` are the scores of the two.
    """
    config, tests, missing = base.config, dict[str, LossTest](), list[Asked]()
    margin = config.goal.tested_margin
    for name, prompts in base.rows["evaluation"].items():
        labels = labelling.labels[name] if labelling else None
        dense, small = run.open(before[name]), run.open(after[name])
        pair = compared(config, name, dense, small, run.open(prompts), labels)
        if labelling is None:
            tests[name] = evaluation.noninferiority_test(pair.dense, pair.small, margin, level)
            continue
        tests[name], waits = evaluation.test_at_looks(pair, looks[name], margin, level)
        for place in np.flatnonzero(pair.missing).tolist() if waits else []:
            part = next(number for number, look in enumerate(looks[name], 1) if place < look.rows)
            missing.append(replace(labelling.rows[name][int(pair.dense.examples[place])], part=part))
    return tests, sorted(missing, key=lambda row: row.part)
