"""The command that asks a person for labels, one row after another."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tailored_llama.data import NONE, read_asked, write_asked
from tailored_llama.errors import InputError

labelling = typer.Typer()

LEAVE = ("q", "quit")


@labelling.command(epilog="Example: `tailored-llama label to-label.csv`")
def label(
    file: Annotated[Path, typer.Argument(help="The .csv or .jsonl file that a search has written.")],
    again: Annotated[
        int, typer.Option(min=0, help="Ask so many labelled rows a second time, and say how often answers differ.")
    ] = 0,
) -> None:
    """Label the rows that a search needs, one after another; each answer is saved at once."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; allowed: one that a search has written")
    rows, differ = read_asked(file), list[bool]()
    places = [place for place, row in enumerate(rows) if bool(row.answer) == bool(again)]
    if again:
        places = random.sample(places, min(again, len(places)))
    for number, place in enumerate(places, 1):
        row = rows[place]
        print(f"\n{number} of {len(places)}, part {row.part}; q leaves, Enter goes on without an answer")
        answer = _ask(row.row, row.answers)
        if answer in LEAVE:
            break
        if answer and again:
            differ.append(answer != row.answer)
        elif answer:
            rows[place] = replace(row, answer=answer)
            write_asked(file, rows)
    if differ:
        share = f"about {sum(differ) / 2 / len(differ):.1%} of the labels are wrong (goal.label_errors)"
        print(f"{sum(differ)} of {len(differ)} answers differ from the first ones: {share}")
    if not again:
        left = sum(not row.answer for row in rows)
        print(f"{file}: {len(rows) - left} rows are labelled, {left} are left")


def _ask(text: str, answers: tuple[str, ...]) -> str:
    """Show a row and read its answer: a key of the list or an answer's text; any text if there is no list."""
    print(f"\n{text}\n")
    keys = {str(number): answer for number, answer in enumerate(answers, 1)}
    if set(keys) & set(answers):  # answers that are numbers themselves
        keys = {}
    offered = {**keys, "n": NONE} if answers else {}
    print(*(f"  {key}  {answer}" for key, answer in offered.items()), *([] if keys else answers), sep="\n")
    named = {answer.casefold(): answer for answer in (*answers, NONE)}
    while True:
        given = input("answer: ").strip()
        if not given or given in LEAVE or given in answers:
            return given
        if found := offered.get(given, named.get(given.casefold(), "" if answers else given)):
            return found
        print(f"got {given!r}; allowed: {', '.join(offered)}, or an answer")
