"""The labels that a search asks for: rows without an answer, the file in which they are asked for, and its labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailored_llama import data, evaluation, reports
from tailored_llama.config import SmallestConfig, is_written
from tailored_llama.data import UNLABELLED, Asked
from tailored_llama.errors import InputError
from tailored_llama.pipeline.answers import said_of
from tailored_llama.pipeline.bases import Base, Whole
from tailored_llama.pipeline.candidates import Candidate
from tailored_llama.pipeline.executor import Executor

FEW = 160  # labelled rows to choose with; below, labels of differing rows are asked for
TO_CHOOSE = 60  # such labels: they choose better than 160 rows that were labelled whatever the models answer

Labels = Mapping[str, Mapping[int, str]]  # by benchmark and example


class WaitingForLabels(Exception):
    """Ends a search that can go on when rows are labelled; no failure. The message says where they are, and how many.

    `rows` are those without a label, `file` is where they are asked for.
    """

    def __init__(self, message: str, rows: Sequence[Asked] = (), file: Path | None = None) -> None:
        super().__init__(message)
        self.rows, self.file = rows, file


@dataclass(frozen=True)
class Labelling:
    """The rows that may be asked for, in the order of their hashes, and the labels that there are."""

    config: SmallestConfig
    rows: Mapping[str, Mapping[int, Asked]]  # by benchmark and example
    labels: Labels

    def ask(self, wanted: Sequence[Asked], needed: str) -> WaitingForLabels:
        """Ask for labels; returns what ends the search for now, whose message says what they are `needed` for."""
        file = _file(self.config)
        data.write_asked(file, data.merged(wanted, data.read_asked(file)))
        page = file.with_suffix(".html")
        reports.write_label_page(page, file, data.read_asked(file))
        minutes = max(1, round(len(wanted) * evaluation.SECONDS_A_LABEL / 60))
        where = f"they are in {file}, and in {page} for a browser (about {minutes} minutes)"
        return WaitingForLabels(f"{needed}: {where}. Then run this again.", wanted, file)


def read_labelling(run: Executor, base: Base) -> Labelling:
    """The rows of a base that may be asked for, and the labels that stand in `goal.labels`.

    Raises:
        InputError: as `data.labels_in`.
    """
    config, rows = base.config, dict[str, dict[int, Asked]]()
    for benchmark in config.benchmarks:
        name, written = benchmark.name, is_written(benchmark)
        rows[name] = {}
        for split, asked in base.rows.items():
            folder = run.open(asked[name])
            chat = data.read_chat({name: folder})
            unknown = [prompt for prompt in data.read_prompts(folder, split) if prompt.answer == UNLABELLED]
            rows[name] |= {prompt.example: data.ask(name, prompt, chat, written) for prompt in unknown}
    return Labelling(config, rows, data.labels_in(_file(config), rows))


def ask_to_choose(
    run: Executor, labelling: Labelling, base: Base, reference: Whole, candidates: Sequence[Candidate]
) -> None:
    """Ask once for labels of rows that candidates answer differently, where few labelled rows are there to choose with.

    Raises:
        WaitingForLabels: there are such rows, and none of them has a label yet.
    """
    config, wanted = base.config, list[Asked]()
    for name, first in reference.said.items():
        known, rows = reference.answers[name].examples, labelling.rows[name]
        if not candidates or len(known) >= FEW or labelling.labels[name].keys() & set(first.examples.tolist()):
            continue
        prompts = run.open(base.rows["selection"][name])
        said = [said_of(config, name, run.open(own.choosing[name]), prompts, "selection") for own in candidates]
        differs = np.any([own.answers != first.answers for own in said], axis=0)
        asked = [rows[row] for row in first.examples[differs].tolist() if row in rows]
        wanted += asked[: TO_CHOOSE // len(reference.said)]
    if wanted:
        told = f"{len(wanted)} rows need a label, to choose between candidates that answer them differently"
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
