"""What went wrong: each failure on the edge of its threshold, and where a reader finds it."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpers import hits, scored
from tailored_llama.config import RunConfig, validate_config
from tailored_llama.evaluation import RecoveryRow
from tailored_llama.reports import ReportInputs, stored_table, write_report
from tailored_llama.reports.diagnosis import diagnose, no_gain, too_much_removed, unstable
from tailored_llama.reports.inputs import RunResults, results_at
from tailored_llama.store import write_table
from tailored_llama.training import LOG_SCHEMA, Comparison
from tailored_llama.training.records import Outcome, write_comparison


def row(**changes: Any) -> RecoveryRow:
    usual: dict[str, Any] = {"metric": "acc_norm", "examples": 100, "floor": 0.25, "accuracy": 0.4, "stderr": 0.05}
    usual |= {"recovery": 0.8, "recovery_low": 0.7, "recovery_high": 0.9}
    return RecoveryRow(0.2, "tailored", "own", **(usual | changes))


BETTER = Comparison(50, 1.5, 1.2, 0.1, 0.4, 0.5, 0.04)
NOTHING = Comparison(50, 1.5, 1.45, 0.1, 0.44, 0.42, 0.04)


@pytest.mark.parametrize(("recovery", "found"), [(None, False), (0.65, False), (0.6499, True), (0.0, True)])
def test_less_than_65_percent_of_the_dense_model_is_too_little(recovery: float | None, found: bool) -> None:
    finding = too_much_removed(row(recovery=recovery))
    assert (finding is not None) == found
    if finding:
        signature, evidence, lever = finding
        assert signature.startswith("Below 65")
        assert "accuracy is 0.400 ± 0.050" in evidence
        assert "pruning.ratios" in lever
        assert "pruning.kinds" in lever


@pytest.mark.parametrize(
    ("gain", "comparison", "signature"),
    [
        (0.1, BETTER, None),
        (0.1, None, None),
        (0.1, NOTHING, "Tuning brought nothing here"),  # the scored split decides nothing
        (None, NOTHING, "Tuning brought nothing here"),  # pruned was not scored
        (-0.1, NOTHING, "Tuning brought nothing here"),
        (0.0, BETTER, "No gain from tuning where it is scored"),
        (0.0, None, "No gain from tuning where it is scored"),
        (0.001, None, None),
        (None, None, None),
    ],
)
def test_no_gain_is_told_by_the_verdict_or_else_by_the_scores(
    gain: float | None, comparison: Comparison | None, signature: str | None
) -> None:
    bounds = {} if gain is None else {"gain_low": gain - 0.05, "gain_high": gain + 0.05}
    finding = no_gain(row(gain=gain, **bounds), comparison, validate_config({}))
    assert (finding and finding[0].partition(":")[0]) == signature
    if comparison is NOTHING:
        assert finding is not None
        said = "on 50 held-out train examples accuracy went from 0.440 to 0.420 (−2.0 ± 4.0 points) and the loss over"
        assert said + " the choices from 1.500 to 1.450 (−0.050 ± 0.100)" in finding[1]
    if finding and gain == 0.0:
        assert "on the 100 scored examples +0.0 points over the pruned model (95 % interval −5.0 to +5.0)" in finding[1]


@pytest.mark.parametrize(
    ("tuning", "said"),
    [
        ({}, ": an exported model is the untuned one"),
        ({"keep": "always"}, " (an exported model has the adapter all the same, as tuning.keep says)"),
    ],
)
def test_what_becomes_of_an_adapter_that_brought_nothing(tuning: dict[str, Any], said: str) -> None:
    config = validate_config({"tuning": tuning})
    assert isinstance(config, RunConfig)
    finding = no_gain(row(), NOTHING, config)
    assert finding is not None
    assert finding[0] == "Tuning brought nothing here" + said


def log(losses: list[float], held_out: list[float] | None = None) -> dict[str, list[Any]]:
    """A log of one step an epoch, with the held-out loss before the first and after each."""
    steps = len(losses) + 1
    held = [*(held_out or []), *[None] * steps][:steps]
    return {
        "step": list(range(steps)),
        "epoch": list(range(steps)),
        "loss": [None, *losses],
        "learning_rate": [None] * steps,
        "held_out_loss": held,
    }


@pytest.mark.parametrize(
    ("losses", "held_out", "evidence"),
    [
        ([3.0, 2.5, 2.0, 1.5, 1.0], [3.0, 2.0, 1.5], None),
        ([3.0, 2.0, 1.0, 4.0], None, None),  # twice the median of three is none yet
        ([3.0, 2.0, 1.0, 4.1], None, "at step 4 the loss was 4.10, 2.0 times the median of the steps before"),
        ([2.0, 8.0, 2.0], None, None),  # too early to tell
        ([2.0, 2.0, 2.0, 5.0, 2.0, 9.0], None, "at step 6 the loss was 9.00, 4.5 times the median of the steps before"),
        ([2.0, 2.0, 2.0, 5.0, 2.0, 9.0], None, "(2 such steps)"),
        ([1.0], [2.0, 2.2], None),
        ([1.0], [2.0, 2.21], "after epoch 1 the held-out loss was 2.21, before tuning 2.00"),
        ([1.0, 1.0], [2.0, 3.0, 1.0], "after epoch 1 the held-out loss was 3.00, before tuning 2.00"),
        ([1.0], [2.0], None),
        ([], None, None),
    ],
)
def test_unstable_training_on_its_edges(
    losses: list[float], held_out: list[float] | None, evidence: str | None
) -> None:
    finding = unstable(log(losses, held_out))
    if evidence is None:
        assert finding is None
        return
    assert finding is not None
    assert evidence in finding[1]
    assert "tuning.learning_rate" in finding[2]


@pytest.fixture
def failed(tmp_path: Path) -> ReportInputs:
    """A run with all three failures: dense 80, pruned 42, tailored 40 of 100 right."""
    models = {
        name: {"own": scored(tmp_path / name / "own", hits(right), 0.25)}
        for name, right in (("dense", 80), ("pruned", 42), ("tailored", 40))
    }
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_table(adapter / "log.parquet", log([2.0, 2.0, 2.0, 9.0], [3.0, 3.0]), LOG_SCHEMA)
    same = [Outcome(1.0, True, 1.0), Outcome(2.0, False, 2.0)] * 10
    write_comparison(adapter, range(20), same, same)
    run = dataclasses.replace(results_at(0.2, models, ()), adapters={"own": adapter})
    return ReportInputs([run], validate_config({}))


SAID = (
    "Below 65 % of the dense model: too much removed, or the wrong kind",
    "accuracy is 0.400 ± 0.049, 50.0 % of the dense model's",
    "Tuning brought nothing here: an exported model is the untuned one",
    "on 20 held-out train examples accuracy went from 0.500 to 0.500 (+0.0 ± 0.0 points)",
    "Unstable training: rank or learning rate too high",
    "at step 4 the loss was 9.00, 4.5 times the median of the steps before",
)


def plain(text: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", text).replace("&#39;", "'").split())


def test_every_surface_tells_all_three_with_their_evidence_and_levers(failed: ReportInputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_report(failed, out=out)
    console = Console(width=80, record=True)
    console.print(stored_table(out))
    for text in (console.export_text(), *((out / page).read_text() for page in ("report.html", "report.md"))):
        for said in SAID:
            assert said in plain(text), said
        assert plain(text).count("Try: ") == 3


def test_a_run_without_failures_has_no_such_notes(failed: ReportInputs, tmp_path: Path) -> None:
    models = {name: {"own": scored(tmp_path / "good" / name, hits(80), 0.25)} for name in ("dense", "tailored")}
    good = results_at(0.2, models, ())
    out = tmp_path / "out"
    out.mkdir()
    write_report(dataclasses.replace(failed, runs=[good]), out=out)
    for page in ("report.html", "report.md", "table.json"):
        assert "Try: " not in (out / page).read_text()


def test_benchmarks_of_one_signature_share_a_paragraph_and_ratios_are_named_if_there_are_several() -> None:
    rows = tuple(dataclasses.replace(row(recovery=0.5), benchmark=name) for name in ("piqa", "boolq"))
    runs = [RunResults(ratio, rows, {}) for ratio in (0.2, 0.5)]
    (said,) = diagnose(runs[:1], validate_config({}))
    evidence = "accuracy is 0.400 ± 0.050, 50.0\xa0% of the dense model's (95 % interval 70.0–90.0\xa0%)"
    assert f"the wrong kind. piqa: {evidence}; boolq: {evidence}. Try: remove less" in said
    (said,) = diagnose(runs, validate_config({}))
    assert f"boolq (ratio 0.2): {evidence}; piqa (ratio 0.5): {evidence}" in said
