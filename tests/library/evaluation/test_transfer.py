"""Transfer: what the rows say of hand-made scores, what is said when some are missing, and what the page shows."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpers import hits, scored
from tailored_llama.config import DENSE, UNTUNED_MODEL, RunConfig, TransferConfig, validate_as, validate_config
from tailored_llama.errors import InputError
from tailored_llama.evaluation import DIFFERENCE, MEAN, OTHERS, OWN, TransferRow, TransferScore, transfer_rows
from tailored_llama.reports import stored_table
from tailored_llama.reports.transfer import failures, findings, write_transfer
from tailored_llama.store import read_rows

NAMES = ("arc_easy", "boolq", "piqa")
RIGHT = {  # of 100 examples, by model: what is right on NAMES
    DENSE: (50, 60, 65),
    UNTUNED_MODEL: (40, 55, 60),
    "arc_easy": (60, 55, 58),
    "boolq": (42, 70, 60),
    "piqa": (40, 50, 75),
}
FLOORS = (0.25, 0.62, 0.5)


def cells(root: Path, **without: str) -> list[TransferScore]:
    """Scores of every model on every benchmark, those of the models in `without` replaced by an error."""
    return [
        TransferScore(model, name, error=without[model])
        if model in without
        else TransferScore(model, name, scored(root / model / name, hits(right), floor))
        for model, numbers in RIGHT.items()
        for name, right, floor in zip(NAMES, numbers, FLOORS, strict=True)
    ]


def field(rows: list[TransferRow]) -> dict[tuple[str, str], TransferRow]:
    return {(row.model, row.benchmark): row for row in rows}


def test_gains_are_over_the_pruned_model_and_means_over_own_and_other_benchmarks(tmp_path: Path) -> None:
    found = field(transfer_rows(cells(tmp_path), seed=0))
    home = found["arc_easy", "arc_easy"]
    assert (home.accuracy, home.examples, home.metric, home.floor) == (0.6, 100, "acc_norm", 0.25)
    assert home.gain == pytest.approx(0.2)
    assert home.significant
    assert not found["arc_easy", "piqa"].significant
    assert found[UNTUNED_MODEL, "piqa"].gain is None
    assert found[DENSE, "arc_easy"].gain == pytest.approx(0.1)
    assert found["arc_easy", OTHERS].gain == pytest.approx((0.0 - 0.02) / 2)
    assert (found[DENSE, OTHERS].gain, found[DENSE, OTHERS].benchmarks) == (pytest.approx(0.2 / 3), 3)
    means = {label: found[label, MEAN] for label in (OWN, OTHERS, DIFFERENCE)}
    assert [means[label].gain for label in means] == pytest.approx([0.5 / 3, -0.05 / 6, 0.5 / 3 + 0.05 / 6])
    for row in means.values():
        assert row.benchmarks == 3
        assert row.gain_low < row.gain < row.gain_high  # type: ignore[operator]


def test_adapters_that_answer_alike_make_the_mean_no_surer(tmp_path: Path) -> None:
    alike = [
        TransferScore(model, name, scored(tmp_path / model / name, hits(50 if model != UNTUNED_MODEL else 40), 0.25))
        for model in (UNTUNED_MODEL, *NAMES)
        for name in NAMES
    ]
    found = field(transfer_rows(alike, seed=0))
    own, others, difference = (found[label, MEAN] for label in (OWN, OTHERS, DIFFERENCE))
    assert dataclasses.replace(others, model=OWN) == own
    assert (difference.gain, difference.gain_low, difference.gain_high) == (0, 0, 0)


def test_what_failed_is_named_and_the_rest_is_measured(tmp_path: Path) -> None:
    rows = transfer_rows(cells(tmp_path, boolq="CUDA out of memory"), seed=0)
    found = field(rows)
    assert [found["boolq", name].error for name in NAMES] == ["CUDA out of memory"] * 3
    assert found["boolq", OTHERS].gain is None
    assert found[OWN, MEAN].gain == pytest.approx((0.2 + 0.15) / 2)
    assert found[OTHERS, MEAN].gain == pytest.approx(-0.01)
    assert failures(rows) == ["boolq failed on arc_easy, boolq and piqa: CUDA out of memory"]


def test_without_scores_of_the_pruned_model_there_are_accuracies_only(tmp_path: Path) -> None:
    rows = transfer_rows(cells(tmp_path, **{UNTUNED_MODEL: "disk full"}), seed=0)
    assert field(rows)["piqa", "piqa"].accuracy == 0.75
    assert {row.gain for row in rows} == {None}
    assert not any("gains" in line and "interval" in line for line in findings(rows))


def test_scores_of_other_examples_are_refused(tmp_path: Path) -> None:
    made = cells(tmp_path)
    other = TransferScore("piqa", "piqa", scored(tmp_path / "other", hits(75), 0.5, first=7))
    with pytest.raises(InputError, match="scores of piqa: row 0: example 0 against 7"):
        transfer_rows([*made[:-1], other], seed=0)


def test_the_findings_compare_own_and_others_and_name_benchmarks_at_the_floor(tmp_path: Path) -> None:
    first, *rest = findings(transfer_rows(cells(tmp_path), seed=0))
    assert re.search(
        r"gains \+16\.7 points over the pruned model \(95 % interval \d+\.\d to \d+\.\d; mean over 3", first
    )
    assert re.search(r"on the others −0\.8 points \(−\d\.\d to \d\.\d\)", first)
    assert re.search(r"difference, \+17\.5 \(\d+\.\d to \d+\.\d\), is significant", first)
    assert any(re.search(r"dense \+6\.7 \(\d\.\d to \d+\.\d\)", line) for line in rest)
    assert any(line.startswith("Significant: 3 of 3 cells up and 0 down on the own benchmark; 0 of 6") for line in rest)
    assert any("floor on boolq (0.600 ± 0.049 against 0.620)" in line for line in rest)
    assert not any("arc_easy (" in line for line in rest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruning": {"ratios": [0.2, 0.5]}}, "pruning.ratios: got [0.2, 0.5]; allowed: one ratio"),
        (
            {"tuning": {"examples": "mixture"}},
            "tuning.examples: got 'mixture'; allowed: 'benchmark'; the study adds a mixture itself",
        ),
        ({"benchmarks": ["piqa"]}, "benchmarks: got piqa alone; allowed: at least two"),
        ({"benchmarks": ["piqa", {"name": "dense"}]}, "benchmarks: got 'dense'; allowed: another name"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        validate_as(TransferConfig, {"benchmarks": ["piqa", "boolq"]} | changes)


@pytest.fixture
def config() -> RunConfig:
    return validate_config({"benchmarks": list(NAMES), "model": {"source": "<script>x</script>"}})


def test_the_page_and_the_tables(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, out = cells(tmp_path, piqa="<b>CUDA</b> out of memory"), tmp_path / "out"
    out.mkdir()
    write_transfer(config, made, out=out)
    assert read_rows(out / "transfer.parquet", TransferRow) == transfer_rows(made, config.seed)
    page = (out / "transfer.html").read_text()
    assert page.count("<svg") == 1
    assert "<script" not in page
    assert "<b>CUDA" not in page
    assert "piqa failed on arc_easy, boolq and piqa: &lt;b&gt;CUDA" in page
    picture = page[page.index("<svg") : page.index("</svg>")]
    assert "+20.0*" in picture
    assert "(0.600)" in picture  # dense on boolq, at its floor
    assert picture.count(">failed<") == 3
    assert "perplexity" not in page
    markdown = (out / "transfer.md").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "](gains.png)" in markdown
    assert (out / "gains.png").is_file()
    assert "<b>" not in markdown
    assert "| arc_easy | 0.600 +20.0* (± 0.049; 12.0 to 28.0) | (0.550) +0.0 (± 0.050; 0.0 to 0.0) |" in markdown

    Console(width=80).print(stored_table(out))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["dense", ".500", "(.600)", ".650"] in lines
    assert ["easy", "+20.0*", "+0.0", "−2.0", "−1.0"] in lines


def test_a_transfer_without_success_is_still_a_page(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_transfer(
        config, [TransferScore(model, name, error="no") for model in RIGHT for name in NAMES], out=tmp_path / "out"
    )
    assert "No adapter could be compared." in (tmp_path / "out" / "transfer.html").read_text()
