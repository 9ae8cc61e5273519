"""The labels that a search asks for: rows without an answer, the file in which they are asked for, and its labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tailored_llama import data, evaluation, reports
from tailored_llama.config import SmallestConfig, is_written
from tailored_llama.data import Asked
from tailored_llama.errors import InputError
from tailored_llama.pipeline import steps
from tailored_llama.pipeline.answers import Labels, label_forms
from tailored_llama.pipeline.bases import Base
from tailored_llama.pipeline.candidates import Candidate
from tailored_llama.pipeline.executor import Executor

FEW_TO_CHOOSE = 160  # labelled rows; below, labels of differing rows are asked for
TO_CHOOSE = 60  # such labels: they choose about as well as 160 rows that were labelled whatever the models answer
CHOOSING = 0  # their part in the file; the parts of a proof are counted from 1


class WaitingForLabels(Exception):
    """Ends a search that can go on when rows are labelled; no failure. The message says where they are, and how many.

    `rows` are those without a label.
    """

    def __init__(self, message: str, rows: Sequence[Asked] = ()) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True)
class Labelling:
    """The rows that may be asked for, and the labels that there are."""

    config: SmallestConfig
    rows: Mapping[str, Mapping[int, Asked]]  # by benchmark and example
    labels: Labels

    def ask(self, wanted: Sequence[Asked], purpose: str) -> WaitingForLabels:
        """Ask for labels; returns what ends the search for now."""
        file = _file(self.config)
        data.write_asked(file, data.merged(wanted, data.read_asked(file)))
        page = file.with_suffix(".html")
        reports.write_label_page(page, file, data.read_asked(file))
        rows, minutes = len(wanted), max(1, round(len(wanted) * evaluation.SECONDS_A_LABEL / 60))
        told = f"{rows} rows need a label {purpose}. They" if rows > 1 else f"1 row needs a label {purpose}. It"
        where = f"{'are' if rows > 1 else 'is'} in {file}, and in {page} for a browser (about {minutes} minutes)"
        return WaitingForLabels(f"{told} {where}. Then run this again.", wanted)


def read_labelling(run: Executor, base: Base) -> Labelling:
    """The rows of a base that may be asked for, and the labels that stand in `goal.labels`.

    These are all rows to choose with and to prove on, also those that this search does not look at: another search may
    have asked for them.

    Raises:
        InputError: as `data.labels_in` and `label_forms`.
    """
    config, rows = base.config, dict[str, dict[int, Asked]]()
    every = config.model_copy(update={"scoring": config.scoring.model_copy(update={"limit": None})})
    for benchmark in config.benchmarks:
        name, written, examples = benchmark.name, is_written(benchmark), steps.load_examples(benchmark)
        rows[name] = {}
        for split in base.rows:
            count = len(data.read_examples(run.open(examples), split))
            folder = run.open(steps.render(every, name, split, examples, count))
            chat = data.read_chat(folder)
            rows[name] |= {own.example: data.ask(name, own, chat, written) for own in data.read_prompts(folder, split)}
    labels = data.labels_in(_file(config), rows)
    for name, given in labels.items():
        label_forms(config, name, given)  # a label that its metric cannot read is not each candidate's failure
    return Labelling(config, rows, labels)


def ask_to_choose(run: Executor, labelling: Labelling, reference: Candidate, candidates: Sequence[Candidate]) -> None:
    """Ask once for labels of rows that candidates answer differently, where few labelled rows are there to choose with.

    A candidate that differs from the reference on no more rows than it may lose needs no label.

    Raises:
        WaitingForLabels: there are such rows, and none of them has a label yet.
    """
    config, wanted, labelled = reference.base.config, list[Asked](), reference.read(run)
    said = [candidate.said(run) for candidate in candidates]
    for name, first in (of_reference := reference.said(run)).items():
        unknown = ~np.isin(first.examples, labelled[name].examples)
        given = np.isin(first.examples, [*labelling.labels[name]])
        if np.sum(~unknown) >= FEW_TO_CHOOSE or np.any(unknown & given):
            continue
        differing = np.zeros(len(unknown), dtype=bool)
        for own in said:
            differs = own[name].answers != first.answers
            if np.mean(differs) > config.goal.tested_margin:
                differing |= differs
        asked = first.examples[differing & unknown][: TO_CHOOSE // len(of_reference)]
        wanted += [replace(labelling.rows[name][row], part=CHOOSING) for row in asked.tolist()]
    if wanted:
        run.commit()
        told = "to choose a candidate, as one answers otherwise than the dense model; a single label is enough to go on"
        raise labelling.ask(wanted, told)


def check_labels(config: SmallestConfig) -> None:
    """Check before any work that labels can be asked for in `goal.labels`, and that no other job asks there.

    Raises:
        InputError: as `data.read_asked`; there is no such folder; or the file is of another benchmark.
    """
    file, names = _file(config), [benchmark.name for benchmark in config.benchmarks]
    if not file.parent.is_dir():
        raise InputError(f"goal.labels: got {config.goal.labels!r}; allowed: a file in a folder that is there")
    for other in {row.benchmark for row in data.read_asked(file)} - {*names}:
        allowed = f"a file of its own for each search, here of {', '.join(names)}"
        raise InputError(
            f"goal.labels: got {config.goal.labels!r}, which asks for labels of {other!r}; allowed: {allowed}"
        )


def _file(config: SmallestConfig) -> Path:
    return Path(config.goal.labels).expanduser()
