"""The dense model tuned on the same shots in a run's report: its numbers, its words, and where it is drawn."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from helpers import hits, scored
from tailored_llama.config import TUNED_DENSE
from tailored_llama.evaluation import MEAN, TAILORED
from tailored_llama.reports import ModelResults, ReportInputs, RunResults, recovery_table, write_report
from tailored_llama.reports.recovery import against_tuned_dense, read_tuned_dense, tuned_dense_notes


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


def test_tailored_is_set_against_the_tuned_dense_model(given: ReportInputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_report(given, out=out)
    light, heavy = read_tuned_dense(out)
    assert (light.ratio, heavy.ratio) == (0.2, 0.5)
    dense, tailored = light.row(TUNED_DENSE, "piqa"), light.row(TAILORED, "piqa")
    assert dense
    assert tailored
    assert (dense.accuracy, dense.recovery) == (0.8, None)
    assert (tailored.accuracy, tailored.recovery) == (0.72, pytest.approx(0.9))
    assert tailored.chance_corrected == pytest.approx(22 / 30)
    assert tailored.recovery_low
    assert tailored.recovery_high
    assert tailored.recovery_low < 0.9 < tailored.recovery_high
    mean = heavy.row(TAILORED, MEAN)
    assert mean
    assert mean.recovery == pytest.approx(0.8)


def test_it_is_said_in_the_page_the_markdown_and_the_terminal_and_drawn(given: ReportInputs, tmp_path: Path) -> None:
    pages = {}
    for name, inputs in (("with", given), ("without", replace(given, tuned_dense={}))):
        out = tmp_path / name
        out.mkdir()
        write_report(inputs, out=out)
        table = Console(width=80, record=True)
        table.print(recovery_table(out))
        texts = [(out / "report.html").read_text(), (out / "report.md").read_text(), table.export_text()]
        pages[name] = [" ".join(re.sub(r"<[^>]*>", " ", text).split()) for text in texts]
        svg = re.search(r'aria-label="Accuracy by benchmark: ([^"]+)"', texts[0])
        assert svg
        drawn = "dense, dense, tuned, pruned, tailored" if inputs.tuned_dense else "dense, pruned, tailored"
        assert svg[1] == f"{drawn} and the floor"
        assert (out / "tuned_dense.parquet").exists() == bool(inputs.tuned_dense)
    said = "Dense, tuned on the same shots: piqa 0.800 ± 0.040, csqa 0.500 ± 0.050, (mean) 0.650 ± 0.032. Tailored ÷ "
    for text in pages["with"]:
        assert said + "dense, tuned: ratio 0.2 95.0 % (" in text
        assert "), ratio 0.5 80.0 % (" in text
    assert not any("tuned" in text and "same shots" in text for text in pages["without"])
    assert "What pruning costs after tailoring" in pages["with"][0]
    assert "0.800 ± 0.040 0.720 ± 0.045 90.0 %" in pages["with"][0]


def test_a_benchmark_on_which_one_of_the_two_failed_has_the_other(given: ReportInputs) -> None:
    """The mean accuracy needs every benchmark; what both have is compared."""
    run = replace(given.runs[0], tailored={"piqa": given.runs[0].tailored["piqa"]})
    tables = against_tuned_dense(replace(given, runs=(run,)))
    (note,) = tuned_dense_notes(tables)
    assert "csqa 0.500 ± 0.050" in note
    assert note.replace("\N{NO-BREAK SPACE}", " ").split("tuned: ")[1].startswith("90.0 % (")
    only = replace(given, tuned_dense={"piqa": given.tuned_dense["piqa"]})
    (note, *_) = tuned_dense_notes(against_tuned_dense(only))
    assert "csqa" not in note
