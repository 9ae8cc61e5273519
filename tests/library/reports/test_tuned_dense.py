"""The dense model tuned on the same shots in a run's report: its numbers, its words, and where it is drawn."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from helpers import hits, scored
from tailored_llama.reports import ModelResults, ReportInputs, RunResults, stored_table, write_report
from tailored_llama.reports.inputs import scored_runs
from tailored_llama.reports.run import report_notes


def folders(root: Path, piqa: int, csqa: int) -> dict[str, Path]:
    return {"piqa": scored(root / "piqa", hits(piqa), 0.5), "csqa": scored(root / "csqa", hits(csqa), 0.25)}


@pytest.fixture
def given(tmp_path: Path) -> ReportInputs:
    """Two ratios, and a dense model that gains ten points from tuning on each of two benchmarks."""
    pruned = ModelResults(80_000, None, folders(tmp_path / "pruned", 60, 30))
    runs = tuple(
        RunResults(ratio, pruned, folders(tmp_path / f"tailored {ratio}", piqa, csqa))
        for ratio, piqa, csqa in ((0.2, 72, 50), (0.5, 64, 40))
    )
    dense = ModelResults(100_000, None, folders(tmp_path / "dense", 70, 40))
    return ReportInputs("tiny", dense, runs, tuned_dense=folders(tmp_path / "tuned", 80, 50))


def test_it_is_said_in_the_page_the_markdown_and_the_terminal_and_drawn(given: ReportInputs, tmp_path: Path) -> None:
    pages = {}
    for name, inputs in (("with", given), ("without", replace(given, tuned_dense={}))):
        out = tmp_path / name
        out.mkdir()
        write_report(inputs, out=out)
        table = Console(width=80, record=True)
        table.print(stored_table(out))
        texts = [(out / "report.html").read_text(), (out / "report.md").read_text(), table.export_text()]
        pages[name] = [" ".join(re.sub(r"<[^>]*>", " ", text).split()) for text in texts]
        svg = re.search(r'aria-label="Accuracy by benchmark: ([^"]+)"', texts[0])
        assert svg
        drawn = "dense, dense, tuned, pruned, tailored" if inputs.tuned_dense else "dense, pruned, tailored"
        assert svg[1] == f"{drawn} and the floor"
    said = "Dense, tuned on the same shots: piqa 0.800 ± 0.040, csqa 0.500 ± 0.050, (mean) 0.650 ± 0.032. Tailored ÷ "
    for text in pages["with"]:
        assert said + "dense, tuned: ratio 0.2 95.0 % (" in text
        assert "), ratio 0.5 80.0 % (" in text
    assert not any("tuned" in text and "same shots" in text for text in pages["without"])
    assert "0.800 ± 0.040 114.3 % of dense" in pages["with"][0]


def test_a_benchmark_on_which_one_of_the_two_failed_has_the_other(given: ReportInputs) -> None:
    """The mean accuracy needs every benchmark; what both have is compared."""
    run = replace(given.runs[0], tailored={"piqa": given.runs[0].tailored["piqa"]})
    note = note_of(replace(given, runs=(run,)))
    assert "csqa 0.500 ± 0.050" in note
    assert note.split("tuned: ")[1].startswith("90.0 % (")
    assert "csqa" not in note_of(replace(given, tuned_dense={"piqa": given.tuned_dense["piqa"]}))


def note_of(given: ReportInputs) -> str:
    return report_notes(given, scored_runs(given))[0].replace("\N{NO-BREAK SPACE}", " ")
