"""The page of all runs: a row for each model, newest first, from the folder of reports alone."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tailored_llama.config import GoalConfig
from tailored_llama.evaluation import Answer, CandidateFigures, LossTest, ModelRow, RecoveryRow
from tailored_llama.evaluation.answer import write_answer
from tailored_llama.reports import write_index
from tailored_llama.store import ArtifactStore, write_rows

EVIL = "<script>"


def write_run(out: Path) -> None:
    rows = [
        RecoveryRow(ratio, model, "csqa", "acc_norm", 100, 0.25, accuracy, 0.05)
        for ratio, model, accuracy in ((0.2, "dense", 0.46), (0.2, "tailored", 0.5), (0.5, "dense", 0.46))
    ]
    write_rows(out / "recovery.parquet", rows, RecoveryRow)
    sizes = [ModelRow(None, "dense", 134_500_000), ModelRow(0.2, "pruned", 107_600_000)]
    write_rows(out / "models.parquet", sizes, ModelRow)


def write_search(proven: bool) -> Callable[[Path], None]:
    best = CandidateFigures(f"gemma{EVIL}", 0.5, "q5_0", True, True, 10**8, 90_400_000, 9e7, {"csqa": 0.02}, 0.02)
    test = LossTest(1221, 0.03, 0.04, 0.412, 0.403, 0.027, 0.01 if proven else 0.2, None)
    answer = Answer(GoalConfig(), "the dense model", [best], [0], [{"csqa": test}], 1, {}, 0)
    return lambda out: write_answer(answer, out)


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """A folder of reports, one made a minute after the other, in the order of these names."""
    store, folder = ArtifactStore(str(tmp_path / "store")), tmp_path / "reports"
    kinds = {
        "quickstart": ("report", "report", write_run),
        "job": ("smallest", "smallest", write_search(True)),
        "unproven": ("smallest", "smallest", write_search(False)),
        "grid": ("sweep", "sweep", lambda out: None),
    }
    for minute, (name, (stage, page, write)) in enumerate(kinds.items()):

        def make(out: Path, page: str = page, write: Callable[[Path], None] = write) -> None:
            (out / f"{page}.html").touch()
            write(out)

        ref, _ = store.build(stage, 1, {"of": name}, {}, make)
        folder.mkdir(exist_ok=True)
        store.folder(ref.stage, ref.key).rename(folder / name)
        (folder / name / "a page of the user's.html").touch()
        os.utime(folder / name / "manifest.json", (60 * minute, 60 * minute))
    (folder / "notes").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "manifest.json").write_text("{}")
    return folder


def test_every_model_of_every_run_has_its_figures_newest_first(reports: Path) -> None:
    lines = write_index(reports).replace("\xa0", " ").splitlines()
    assert lines[0] == "| run | size | accuracy | dense | certificate | made, UTC |"
    assert lines[2:] == [
        "| grid (sweep) | – | – | – | – | 1970-01-01 (00:03) |",
        "| unproven (the smallest model) | – | – | – | nothing is proven | 1970-01-01 (00:02) |",
        "| job (gemma&lt;script&gt;, vocabulary trimmed, tuned, q5_0) | 90 MB | 0.403 | 0.412 "
        "| loses less than 3 points (95 % confidence) | 1970-01-01 (00:01) |",
        "| quickstart (20 % removed) | 107.6 M (parameters) | 0.500 ± 0.050 | 0.460 ± 0.050 | – | 1970-01-01 (00:00) |",
        "| quickstart (50 % removed) | – | – | 0.460 ± 0.050 | – | 1970-01-01 (00:00) |",
    ]


def test_a_folder_without_reports_says_so(tmp_path: Path) -> None:
    write_index(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "There is no report yet." in page
    assert "The newest report" not in page


def test_the_page_leads_to_the_reports_and_runs_nothing(reports: Path) -> None:
    write_index(reports)
    page = (reports / "index.html").read_text()
    for link in ("quickstart/report.html", "job/smallest.html", "grid/sweep.html"):
        assert f'<a href="{link}">' in page
        assert (reports / link).is_file()
    assert EVIL not in page
    assert sorted(path.name for path in reports.iterdir() if path.is_file()) == ["index.html"]
