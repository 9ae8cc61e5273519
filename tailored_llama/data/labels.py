"""The file in which labels are asked for and given: rows, their possible answers, and never what a model answered."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from tailored_llama.config import from_json, label_of
from tailored_llama.data.chat import Chat
from tailored_llama.data.prompts import Prompt
from tailored_llama.errors import InputError
from tailored_llama.files import read_file, unfinished

NONE = "none of these"  # the label of a row for which no possible answer is right


@dataclass(frozen=True)
class Asked:
    """A row whose label is asked for. Part 0 is to choose with; a proof may be found after any other whole `part`."""

    benchmark: str
    part: int
    row: str
    answers: tuple[str, ...]  # that are possible, in a fixed order; empty if any text is
    answer: str = ""  # empty: not known yet
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from other rows, however a spreadsheet has changed its white space."""
        return self.benchmark, *(" ".join(text.split()) for text in (self.row, *self.answers))


COLUMNS = tuple(field.name for field in fields(Asked))


def ask(benchmark: str, prompt: Prompt, chat: Chat | None, written: bool) -> Asked:
    """Ask for the label of a row, as the user's message where a chat can ask it; a `written` answer may be any text.

    Raises:
        InputError: a choice is called as the label for none of the choices.
    """
    told = chat.message_in(prompt.contexts[0]) if chat and not prompt.messages else prompt.contexts[0]
    if prompt.messages:
        told = "\n\n".join(message["content"] for message in json.loads(prompt.messages))
    answers = () if written else tuple(choice.strip() for choice in prompt.continuations)
    if NONE in map(str.casefold, answers):
        raise InputError(f"{benchmark}: got the choice {NONE!r}; allowed: another text, as that answers for no choice")
    return Asked(benchmark, 1, told, answers)


def write_asked(file: Path, rows: Sequence[Asked]) -> None:
    """Write the rows as .csv or .jsonl, by the name of the file."""
    is_csv = file.suffix == ".csv"
    with unfinished(file) as new, new.open("w", encoding="utf-8-sig" if is_csv else "utf-8", newline="") as out:
        if is_csv:  # with a mark by which Excel knows its encoding
            table = csv.DictWriter(out, COLUMNS)
            table.writeheader()
            table.writerows(asdict(row) | {"answers": json.dumps(row.answers, ensure_ascii=False)} for row in rows)
        else:
            out.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def read_asked(file: Path) -> list[Asked]:
    """The rows of a file that `write_asked` wrote, with the labels that it has been given since; none without a file.

    Empty rows are left out.

    Raises:
        InputError: as `read_file`; it lacks a column, or a label is none of the row's possible answers.
    """
    if not file.is_file():
        return []
    rows = []
    for number, cells in enumerate(read_file(file, may_be_empty=True)):
        if missing := [column for column in COLUMNS[:-1] if column not in cells]:
            allowed = f"the columns {', '.join(COLUMNS)}"
            raise InputError(f"{file}: row {number}: got no column {missing[0]!r}; allowed: {allowed}")
        if not label_of(cells["row"]):
            continue
        offered = cells["answers"] if isinstance(cells["answers"], list) else from_json(str(cells["answers"] or "[]"))
        if not isinstance(offered, list):
            raise InputError(f"{file}: row {number}: answers: got {cells['answers']!r}; allowed: as they were written")
        answers, answer, part = tuple(map(label_of, offered)), label_of(cells["answer"]), label_of(cells["part"])
        named = {own.casefold(): own for own in (*answers, NONE)}
        if answer and answers and answer not in answers:
            if answer.casefold() not in named:
                allowed = ", ".join(map(repr, (*answers, NONE)))
                raise InputError(f"{file}: row {number}: answer: got {answer!r}; allowed: {allowed}")
            answer = named[answer.casefold()]
        place = int(part) if part.isdigit() else 1
        benchmark, note = label_of(cells["benchmark"]), label_of(cells.get("note"))
        rows.append(Asked(benchmark, place, str(cells["row"]), answers, answer, note))
    return rows


def labels_in(file: Path, known: Mapping[str, Mapping[int, Asked]]) -> dict[str, dict[int, str]]:
    """The labels that a file has, by benchmark and example; `known` are all rows that may be asked for.

    Raises:
        InputError: as `read_asked`; a row was not asked for, or was changed; or it has two labels.
    """
    of: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for name, rows in known.items():
        for example, row in rows.items():
            of.setdefault(row.key, []).append((name, example))
    labels: dict[str, dict[int, str]] = {name: {} for name in known}
    for number, row in enumerate(read_asked(file)):
        if row.key not in of:
            raise InputError(
                f"{file}: row {number}: got {row.row[:60]!r} of {row.benchmark or 'no benchmark'}, which was not asked "
                "for, or was changed; allowed: rows as they were written, or another file (goal.labels)"
            )
        for name, example in of[row.key] if row.answer else []:
            if (first := labels[name].setdefault(example, row.answer)) != row.answer:
                told = f"got {row.answer!r} for a row that has {first!r} above"
                raise InputError(f"{file}: row {number}: answer: {told}; allowed: one answer for a row")
    return labels


def merged(rows: Sequence[Asked], answered: Sequence[Asked]) -> list[Asked]:
    """Rows that are asked for with the answers that they have already, after all other answered ones."""
    wanted = {row.key: row for row in rows}
    given = {row.key: row for row in answered if row.answer or row.note}
    kept = [row for key, row in given.items() if key not in wanted]
    return kept + [
        replace(row, answer=given[key].answer, note=given[key].note) if key in given else row
        for key, row in wanted.items()
    ]
