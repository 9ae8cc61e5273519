"""The dense model tuned on the same shots in a run's report: its numbers, its words, and where it is drawn."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from helpers import hits, scored
from tailored_llama.config import validate_config
from tailored_llama.evaluation import MeasuredModel, TailoredRun
from tailored_llama.reports import ReportInputs, run_results, stored_table, write_report
from tailored_llama.reports.run import report_notes


def folders(root: Path, piqa: int, csqa: int) -> dict[str, Path]:
    return {"piqa": scored(root / "piqa", hits(piqa), 0.5), "csqa": scored(root / "csqa", hits(csqa), 0.25)}


@pytest.fixture
def runs(tmp_path: Path, tiny: Path) -> Callable[..., ReportInputs]:
    """Two ratios, and a dense model that gains ten points from tuning on each of two benchmarks; some lack a score."""
    dense = MeasuredModel(tiny, None, folders(tmp_path / "dense", 70, 40))
    pruned = MeasuredModel(tiny, None, folders(tmp_path / "pruned", 60, 30))
    tailored = {0.2: folders(tmp_path / "tailored 0.2", 72, 50), 0.5: folders(tmp_path / "tailored 0.5", 64, 40)}
    tuned = folders(tmp_path / "tuned", 80, 50)

    def results(ratios: Sequence[float], lacks: Sequence[str] = (), tuned_lacks: Sequence[str] = ()) -> ReportInputs:
        both = {name: folder for name, folder in tuned.items() if name not in tuned_lacks}
        found = []
        for ratio in ratios:
            scores = {name: folder for name, folder in tailored[ratio].items() if name not in lacks}
            found.append(run_results(dense, TailoredRun(ratio, pruned, {}, scores), both, 0))
        return ReportInputs(found, validate_config({}))

    return results


def test_it_is_said_in_the_page_the_markdown_and_the_terminal_and_drawn(
    runs: Callable[..., ReportInputs], tmp_path: Path
) -> None:
    pages = {}
    for name, lacks in (("with", ()), ("without", ("piqa", "csqa"))):
        out = tmp_path / name
        out.mkdir()
        write_report(runs((0.2, 0.5), tuned_lacks=lacks), out=out)
        table = Console(width=80, record=True)
        table.print(stored_table(out))
        texts = [(out / "report.html").read_text(), (out / "report.md").read_text(), table.export_text()]
        pages[name] = [" ".join(re.sub(r"<[^>]*>", " ", text).split()) for text in texts]
        svg = re.search(r'aria-label="Accuracy by benchmark: ([^"]+)"', texts[0])
        assert svg
        drawn = "dense, dense, tuned, pruned, tailored" if name == "with" else "dense, pruned, tailored"
        assert svg[1] == f"{drawn} and the floor"
    said = "Dense, tuned on the same shots: piqa 0.800 ± 0.040, csqa 0.500 ± 0.050, (mean) 0.650 ± 0.032. Tailored ÷ "
    for text in pages["with"]:
        assert said + "dense, tuned: ratio 0.2 95.0 % (" in text
        assert "), ratio 0.5 80.0 % (" in text
    assert not any("tuned" in text and "same shots" in text for text in pages["without"])
    assert "0.800 ± 0.040 114.3 % of dense" in pages["with"][0]


def test_a_benchmark_on_which_one_of_the_two_failed_has_the_other(runs: Callable[..., ReportInputs]) -> None:
    """The mean accuracy needs every benchmark; what both have is compared."""
    note = note_of(runs([0.2], lacks=["csqa"]))
    assert "csqa 0.500 ± 0.050" in note
    assert note.split("tuned: ")[1].startswith("90.0 % (")
    assert "csqa" not in note_of(runs((0.2, 0.5), tuned_lacks=["csqa"]))


def note_of(given: ReportInputs) -> str:
    return report_notes(given.runs)[0].replace("\N{NO-BREAK SPACE}", " ")
