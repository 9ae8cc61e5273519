"""The proof of a search: what is tested is written down, then candidates are tested in turn, the safest first.

Where the rows to prove on have no labels, these are asked for at planned looks, and only for rows that the candidate
under test and the reference answer differently.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tailored_llama import data, evaluation, reports, store
from tailored_llama.config import SmallestConfig, is_written, named_benchmark
from tailored_llama.data import Asked, PromptSplit
from tailored_llama.errors import InputError
from tailored_llama.evaluation import Look, LossTest, RowSet
from tailored_llama.pipeline import candidates, steps
from tailored_llama.pipeline.answers import compared, said_of
from tailored_llama.pipeline.bases import Base
from tailored_llama.pipeline.candidates import Candidate
from tailored_llama.pipeline.executor import Executor
from tailored_llama.pipeline.graph import Artifacts, nodes_in

Sets = dict[str, dict[str, RowSet]]  # by benchmark and purpose
Labels = Mapping[str, Mapping[int, str]]  # by benchmark and example

log = logging.getLogger(__name__)


class WaitingForLabels(Exception):
    """Ends a search that can go on when rows are labelled; no failure. The message says where they are, and how many.

    `rows` are those without a label, `file` is where they are asked for.
    """

    def __init__(self, message: str, rows: Sequence[Asked] = (), file: Path | None = None) -> None:
        super().__init__(message)
        self.rows, self.file = rows, file


@dataclass(frozen=True)
class Proving:
    """What was tested, on which rows, with what result.

    `tested` are the candidates of the tests, and `scores` theirs on the proving rows; `reference` and `prompts` are the
    scores of the reference, and the rows as it is asked. `labels` are those of rows that had none before.
    """

    opening: int
    record: str
    sets: Sets
    tested: Sequence[Candidate]
    scores: Sequence[Artifacts]
    tests: Sequence[Mapping[str, LossTest]]
    reference: Artifacts
    prompts: Artifacts
    labels: Labels = field(default_factory=dict)


def prove(run: Executor, bases: Sequence[Base], reference: Candidate, order: Sequence[Candidate]) -> Proving:
    """Open the proving rows, and test candidates on them in their order; the first that fails ends the sequence.

    Raises:
        WaitingForLabels: more labels may prove the candidate whose turn it is.
        InputError: the file of labels has what was not asked for.
    """
    config = bases[0].config
    asked = _planned_rows(run, reference, order) if config.benchmarks[0].unlabelled else None
    opening, record = _open(run, bases, order, asked)
    if asked:
        of = {base.given: _limited(base, asked) for base in bases}
        reference = replace(reference, base=of[reference.base.given])
        order = [replace(candidate, base=of[candidate.base.given]) for candidate in order]
    level = evaluation.level_of(opening, config.goal.confidence)
    names = "; ".join(candidate.label for candidate in order)
    log.info("opening %d of the proving rows: each test at level %.2g. In this order: %s", opening, level, names)
    before = candidates.scores(reference, "evaluation")
    labelling = _labelling(run, reference.base, bases[0].rows["evaluation"], level) if asked else None
    tests, scores = list[Mapping[str, LossTest]](), list[Artifacts]()
    for candidate in order:
        after = candidates.scores(candidate, "evaluation")
        run.begin(before, after)
        tested, missing = _test(run, reference.base, before, after, level, labelling)
        if labelling and missing and config.goal.ask and all(t.proven or t.missing for t in tested.values()):
            raise labelling.wait(candidate, missing, order[: len(tests)])
        tests.append(tested)
        scores.append(after)
        _tell(candidate, tested)
        if not evaluation.is_proven(tested):
            break
    sets, prompts = row_sets(run, reference.base), reference.base.rows["evaluation"]
    labels = labelling.labels if labelling else {}
    return Proving(opening, record, sets, order[: len(tests)], scores, tests, before, prompts, labels)


def _tell(candidate: Candidate, tested: Mapping[str, LossTest]) -> None:
    proven, worst = evaluation.is_proven(tested), max(tested.values(), key=lambda test: test.bound)
    told = "is proven" if proven else "is not proven, which ends the sequence"
    lost, most = candidates.points_lost(worst.loss), round(100 * worst.bound, 1) + 0.0  # no minus zero
    log.info("%s %s: it %s, and a loss of %.1f is not excluded", candidate.label, lost, told, most)


def row_sets(run: Executor, base: Base) -> Sets:
    """The three sets of rows of every benchmark, as a base is asked; all bases have the same rows."""
    sets = Sets()
    parts: dict[str, tuple[Artifacts, tuple[PromptSplit, ...]]] = {
        "tuning": (base.prompts.shots, ("shots", "held_out")),
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

    Rows and base models are known by their content. Another margin, measure, number of rows that are looked at or list
    of candidates is another plan.
    """
    goal, root = bases[0].config.goal, bases[0].config.store.root
    made_of = [(own.checkpoint, own.adapter, own.choosing) for own in order]
    tested = [[run.result(node).key for node in nodes_in(parts)] for parts in made_of]
    plan = {"margin": goal.lose_at_most, "confidence": goal.confidence, "measure": goal.measure, "tested": tested}
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


def _planned_rows(run: Executor, reference: Candidate, order: Sequence[Candidate]) -> int:
    """How many rows to look at: enough for the candidate that differs most from the reference on the choosing rows."""
    config, needed = reference.base.config, 0
    margin, power = config.goal.tested_margin, evaluation.POWER ** (1 / len(config.benchmarks))
    level = evaluation.level_of(1, config.goal.confidence)
    known = reference.choosing or candidates.scores(reference, "selection")
    for name in known:
        prompts = run.open(reference.base.rows["selection"][name])
        first = said_of(config, name, run.open(known[name]), prompts, "selection")
        for candidate in order:
            own = said_of(config, name, run.open(candidate.choosing[name]), prompts, "selection")
            share = (int(np.sum(own.answers != first.answers)) + 1) / (len(own.answers) + 2)  # never nothing
            needed = max(needed, evaluation.rows_to_prove(margin, level, share, power))
    return min(needed, max(own["proving"].rows for own in row_sets(run, reference.base).values()))


def _limited(base: Base, rows: int) -> Base:
    """A base that is asked so many of its proving rows, evenly spaced in the order of their hashes."""
    config = base.config.model_copy(update={"scoring": base.config.scoring.model_copy(update={"limit": rows})})
    asked = {
        own.name: steps.render(config, own.name, "evaluation", steps.load_examples(own)) for own in config.benchmarks
    }
    return replace(
        base,
        config=config,
        prompts=replace(base.prompts, evaluation=asked),
        rows={"selection": base.rows["selection"], "evaluation": asked},
    )


def check_labels(config: SmallestConfig) -> None:
    """Check before any work that labels can be asked for in `goal.labels`, and that no other job asks there.

    Raises:
        InputError: as `data.read_asked`; there is no such folder; or the file is of another benchmark.
    """
    file, names = Path(config.goal.labels).expanduser(), [benchmark.name for benchmark in config.benchmarks]
    if not file.parent.is_dir():
        raise InputError(f"goal.labels: got {config.goal.labels!r}; allowed: a file in a folder that is there")
    for other in {row.benchmark for row in data.read_asked(file)} - {*names}:
        allowed = f"a file of its own for each search, here of {', '.join(names)}"
        raise InputError(
            f"goal.labels: got {config.goal.labels!r}, which asks for labels of {other!r}; allowed: {allowed}"
        )


@dataclass(frozen=True)
class Labelling:
    """The rows to prove on, the labels that there are, and the looks, by benchmark."""

    config: SmallestConfig
    rows: Mapping[str, Sequence[Asked]]  # in their order
    labels: Labels
    looks: Mapping[str, tuple[Look, ...]]

    @property
    def file(self) -> Path:
        return Path(self.config.goal.labels).expanduser()

    def wait(
        self, candidate: Candidate, missing: Mapping[str, Sequence[int]], proven: Sequence[Candidate]
    ) -> Exception:
        """Ask for the missing labels, by benchmark and position of the row; returns what ends the search for now."""
        wanted = [
            replace(self.rows[name][place], part=self._part(name, place))
            for name, places in missing.items()
            for place in places
        ]
        wanted.sort(key=lambda row: row.part)
        data.write_asked(self.file, data.merged(wanted, data.read_asked(self.file)))
        page = self.file.with_suffix(".html")
        reports.write_label_page(page, self.file, data.read_asked(self.file))
        first = sum(row.part == wanted[0].part for row in wanted)
        minutes = len(wanted) * evaluation.SECONDS_A_LABEL / 60
        lost = candidates.points_lost(candidate.measured.loss)
        told = (
            f"{candidate.label}, {candidate.measured.bytes / 1e6:.1f} MB, {lost} on the choosing rows. To prove it, "
            f"{len(wanted)} rows need a label, {first} of them first: they are in {self.file}, and in {page} for a "
            f"browser (about {max(1, round(minutes))} minutes). Then run this again."
        )
        if proven:
            told += f" Proven so far: {proven[-1].label}; goal.ask = false takes that."
        return WaitingForLabels(told, wanted, self.file)

    def _part(self, name: str, place: int) -> int:
        return next(number for number, look in enumerate(self.looks[name], 1) if place < look.rows)


def _labelling(run: Executor, base: Base, everything: Artifacts, level: float) -> Labelling:
    """Read the labels that there are, and plan the looks; `everything` are all rows to prove on, as prompts."""
    config, known, rows = base.config, dict[str, dict[int, Asked]](), dict[str, list[Asked]]()
    for name, folder in everything.items():
        chat, written = data.read_chat({name: run.open(folder)}), is_written(named_benchmark(config, name))
        prompts = data.read_prompts(run.open(folder), "evaluation")
        known[name] = {prompt.example: data.ask(name, prompt, chat, written) for prompt in prompts}
        asked = data.read_prompts(run.open(base.rows["evaluation"][name]), "evaluation")
        rows[name] = [known[name][prompt.example] for prompt in asked]
    margin = config.goal.tested_margin
    looks = {name: evaluation.plan_looks(len(own), margin, level) for name, own in rows.items()}
    return Labelling(config, rows, data.labels_in(Path(config.goal.labels).expanduser(), known), looks)


def _test(
    run: Executor, base: Base, before: Artifacts, after: Artifacts, level: float, labelling: Labelling | None
) -> tuple[dict[str, LossTest], dict[str, list[int]]]:
    """Test a candidate on every benchmark; also the rows whose labels may still prove it, by their positions.

    `base` is that of the reference; `before` and `after` are the scores of the two.
    """
    config, tests, missing = base.config, dict[str, LossTest](), dict[str, list[int]]()
    margin = config.goal.tested_margin
    for name, prompts in base.rows["evaluation"].items():
        labels = labelling.labels[name] if labelling else None
        dense, small = run.open(before[name]), run.open(after[name])
        pair = compared(config, name, dense, small, run.open(prompts), labels)
        if labelling is None:
            tests[name] = evaluation.noninferiority_test(pair.dense, pair.small, margin, level)
            continue
        tests[name], waits = evaluation.test_at_looks(pair, labelling.looks[name], margin, level)
        if waits:
            missing[name] = np.flatnonzero(pair.missing).tolist()
    return tests, missing
