"""The page of all runs: what lies in a folder of reports, newest first."""

import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from tailored_llama import evaluation
from tailored_llama.config import DENSE
from tailored_llama.errors import InputError
from tailored_llama.evaluation import PRUNED, TAILORED, Answer
from tailored_llama.reports.pages import Report, Section, from_template
from tailored_llama.reports.parts import accuracy_of, megabytes, number, percent
from tailored_llama.reports.tables import Cell, Column, Table, markdown, table_row
from tailored_llama.store import FORMER, MANIFEST, REPORTS, read_manifest

INDEX = "index.html"
FIGURES = (*map(Column, ("size", "accuracy", "dense")), Column("certificate", left=True))


def write_index(folder: Path) -> str:
    """Write `index.html` into a folder of reports, whole or not at all; returns the same table in Markdown.

    A run has a row for each of its models. Folders that hold no report of this version are passed over.
    """
    runs = []
    for file in folder.glob(f"*/{MANIFEST}"):
        with suppress(InputError):
            if (manifest := read_manifest(file.parent)).stage in (*REPORTS, *FORMER):
                pages = [name for name in manifest.files if name.endswith(".html")]  # not those a user put beside it
                runs.append((file.stat().st_mtime, file.parent, pages[0], list(_models(manifest.stage, file.parent))))
    rows = []
    for made, report, page, models in sorted(runs, key=lambda run: -run[0]):
        for which, *figures in models:
            name = Cell(report.name, (which,), link=f"{report.name}/{page}")
            date, time = f"{datetime.fromtimestamp(made, UTC):%Y-%m-%d %H:%M}".split()
            unknown = [Cell("–")] * (len(FIGURES) - len(figures))
            rows.append(table_row(name, *figures, *unknown, Cell(date, (time,))))
    table = Table((Column("run", left=True), *FIGURES, Column("made, UTC")), tuple(rows))
    part = folder / f".{INDEX}.{os.getpid()}"
    runs_page = Report("All runs", (), (), [Section("", table=table)])
    part.write_text(from_template("page.html.j2", report=runs_page, name="index"), encoding="utf-8")
    part.replace(folder / INDEX)
    return markdown(table)


def _models(stage: str, report: Path) -> Iterator[tuple[str, *tuple[Cell, ...]]]:
    """Return what the page shows of each model: which it is, and its `FIGURES`, of which the last may be absent."""
    if stage == "report":
        rows, sizes = evaluation.read_recovery(report)
        for ratio in dict.fromkeys(row.ratio for row in rows):
            overall = {row.model: row for row in rows if row.ratio == ratio}  # of a model, the mean comes last
            count = next((own.parameters for own in sizes if (own.model, own.ratio) == (PRUNED, ratio)), None)
            size = Cell("–") if count is None else Cell(f"{number(count / 1e6, 1)} M", ("parameters",))
            tailored, dense = (accuracy_of(overall.get(model)) for model in (TAILORED, DENSE))
            yield f"{percent(ratio, 0)} removed", size, tailored, dense
    elif stage == "smallest":
        yield _smallest(evaluation.read_answer(report))
    else:
        yield (stage,)


def _smallest(answer: Answer) -> tuple[str, *tuple[Cell, ...]]:
    if (proven := answer.proven) is None:
        return "the smallest model", Cell("–"), Cell("–"), Cell("–"), Cell("nothing is proven")
    tests = answer.tested[proven].values()
    small, dense = (Cell(number(fmean(getattr(test, of) for test in tests))) for of in ("small", "dense"))
    goal, best = answer.goal, answer.candidates[proven]
    proof = Cell(f"loses less than {goal.lose_at_most:g} points", (f"{100 * goal.confidence:g} % confidence",))
    return best.label, Cell(megabytes(best.bytes)), small, dense, proof
