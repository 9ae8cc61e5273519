"""Reports from hand-made folders: the numbers, the words, what must never be in the page, what may be absent."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from helpers import hits, scored, write_prompts
from tailored_llama.config import validate_config
from tailored_llama.errors import InputError
from tailored_llama.evaluation import (
    MEAN,
    ByType,
    MeasuredModel,
    ModelRow,
    RecoveryRow,
    TailoredRun,
    compare_scores,
    read_recovery,
)
from tailored_llama.evaluation.written import answers_schema
from tailored_llama.reports import ReportInputs, run_results, stored_table, write_report
from tailored_llama.reports.inputs import RunResults, results_at
from tailored_llama.store import Manifest, write_table
from tailored_llama.store.tables import schema_of
from tailored_llama.training import LOG_SCHEMA
from tailored_llama.training.records import HELD_OUT_SCHEMA

ATTACK = "<script>alert(1)</script><img src=https://example.com/x.png onerror=alert(2)>"
NBSP = "\N{NO-BREAK SPACE}"


SIZES = (ModelRow(None, "dense", 100_000, 20.5), ModelRow(0.2, "pruned", 80_000, 40.25))

Folders = dict[str, dict[str, Path]]


def folders(root: Path) -> Folders:
    """Scores on two benchmarks: one that dense knows, one on which dense is at its floor."""
    return {
        name: {
            "arc_easy": scored(root / name / "arc_easy", hits(easy), 0.25),
            "boolq": scored(root / name / "boolq", hits(boolq), 0.62, "acc"),
        }
        for name, easy, boolq in (("dense", 50, 42), ("pruned", 30, 40), ("tailored", 40, 63))
    }


def report_of(*runs: RunResults) -> ReportInputs:
    """The report of runs, of which nothing else is known."""
    return ReportInputs(runs, validate_config({"model": {"source": "tiny"}}))


def inputs(root: Path, **changes: Any) -> ReportInputs:
    """One ratio. Only scores and sizes are given."""
    run = results_at(0.2, folders(root), SIZES)
    return replace(report_of(run), **{"perplexity": {"tokens": 511, "window": 512}} | changes)


def of_scores(scores: Folders, ratio: float | None = None) -> ReportInputs:
    """One ratio, of which nothing but scores is known."""
    return report_of(results_at(ratio, scores, ()))


def run_of(given: ReportInputs) -> RunResults:
    """The only run."""
    (run,) = given.runs
    return run


def manifest(stage: str, seconds: float, memory: int, **measured: Any) -> Manifest:
    return Manifest(stage, 1, "", {}, {}, {}, {"torch": ATTACK}, seconds, memory, measured)


def row_of(run: RunResults, model: str, benchmark: str) -> RecoveryRow:
    row = run.row(model, benchmark)
    assert row is not None
    return row


def everything(root: Path) -> ReportInputs:
    """The same with all that is optional, and markup in every place that takes text from outside."""
    base = inputs(root)
    for name in ("log", "prompts"):
        (root / name).mkdir()
    log = {
        "step": [0, 1],
        "epoch": [0, 1],
        "loss": [None, 2.0],
        "learning_rate": [None, 1.0],
        "held_out_loss": [2, 1.5],
    }
    write_table(root / "log" / "log.parquet", log, LOG_SCHEMA)
    held_out = {"example": [0, 1], "untuned_loss": [2.0, 1.5], "tuned_loss": [1.0, 1.0]}
    held_out |= {"untuned_right": [False, False], "tuned_right": [True, False]}
    write_table(root / "log" / "held_out.parquet", held_out, HELD_OUT_SCHEMA)
    write_prompts(root / "prompts", f"Is {ATTACK}?", "second")
    run = base.runs[0]
    return ReportInputs(
        config=validate_config({"seed": 7, "scoring": {"limit": 100}, "model": {"source": f"tiny {ATTACK}"}}),
        perplexity=base.perplexity,
        runs=[replace(run, adapters={f"boolq$x$ {ATTACK}": root / "log"})],
        prompts={ATTACK: root / "prompts"},
        costs=[(ATTACK, manifest("tune", 83.0, 2**30, tokens_per_second=1234.5)), ("", manifest("prune", 1.5, 0))],
    )


class Elements(HTMLParser):
    """The elements of a page, their attributes, and whether every one that was opened is closed."""

    void = ("meta", "br", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def written(given: ReportInputs, out: Path) -> str:
    out.mkdir()
    write_report(given, out=out)
    return (out / "report.html").read_text()


def test_rows_hold_the_numbers(tmp_path: Path) -> None:
    run = run_of(inputs(tmp_path))
    assert (run.ratio, run.benchmarks, run.lines) == (0.2, ["arc_easy", "boolq"], ["arc_easy", "boolq", MEAN])
    dense, pruned, easy = (row_of(run, model, "arc_easy") for model in ("dense", "pruned", "tailored"))
    assert (easy.metric, easy.examples, easy.floor, easy.ratio) == ("acc_norm", 100, 0.25, 0.2)
    assert (dense.accuracy, pruned.accuracy, easy.accuracy) == (0.5, 0.3, 0.4)
    assert (dense.recovery, dense.gain) == (None, None)
    assert (pruned.recovery, pruned.gain) == (pytest.approx(0.6), None)
    assert easy.recovery == pytest.approx(0.8)
    assert easy.chance_corrected == pytest.approx(0.6)
    assert dense.above_floor is True
    assert easy.recovery_low is not None
    assert easy.recovery_high is not None
    assert 0.6 < easy.recovery_low < 0.8 < easy.recovery_high < 1
    assert run.size("dense") == ModelRow(None, "dense", 100_000, 20.5)
    assert run.size("pruned") == ModelRow(0.2, "pruned", 80_000, 40.25)
    assert easy.gain == pytest.approx(0.1)
    assert easy.gain_low is not None
    assert easy.gain_high is not None
    assert 0 < easy.gain_low < 0.1 < easy.gain_high < 0.2  # ten of a hundred, and no example the other way
    boolq = row_of(run, "tailored", "boolq")
    assert boolq.recovery == pytest.approx(1.5)
    assert row_of(run, "dense", "boolq").above_floor is False
    assert (boolq.chance_corrected, boolq.cc_low, boolq.cc_high) == (None, None, None)
    mean = row_of(run, "tailored", MEAN)
    assert mean == run.overall("tailored")
    assert mean.recovery == pytest.approx((0.8 + 1.5) / 2)
    assert mean.recovery_benchmarks == 2
    assert mean.chance_corrected == pytest.approx(0.6)  # boolq's would have no meaning
    assert mean.cc_benchmarks == 1
    whole = row_of(run, "dense", MEAN)
    assert whole.accuracy == pytest.approx(0.46)
    errors = [row_of(run, "dense", name).stderr for name in run.benchmarks]
    assert whole.stderr == pytest.approx(np.hypot(*errors) / 2)


def test_an_interval_does_not_depend_on_the_other_benchmarks(tmp_path: Path) -> None:
    scores = folders(tmp_path)
    alone = of_scores({model: {"arc_easy": own["arc_easy"]} for model, own in scores.items()})
    both = [row for row in run_of(of_scores(scores)).rows if row.benchmark == "arc_easy"]
    assert list(run_of(alone).rows) == both  # and one benchmark needs no mean


def test_the_mean_gain_has_an_interval_of_all_benchmarks(tmp_path: Path) -> None:
    run = run_of(inputs(tmp_path))
    easy, boolq, mean = (row_of(run, "tailored", name) for name in run.lines)
    assert (easy.gain, boolq.gain) == (pytest.approx(0.1), pytest.approx(0.23))
    assert mean.gain == pytest.approx(0.165)
    assert mean.gain_low is not None
    assert mean.gain_high is not None
    assert mean.gain_low < 0.165 < mean.gain_high
    assert mean.gain_high - mean.gain_low < boolq.gain_high - boolq.gain_low  # type: ignore[operator]


def test_written_answers_are_reported_like_choices(tmp_path: Path) -> None:
    models = {}
    for name, values in (("dense", [1.0, 0.5, 0.5, 0.0]), ("tailored", [1.0, 0.5, 0.0, 0.0])):
        folder = tmp_path / name
        folder.mkdir()
        columns = {
            "example": range(4),
            "text": ["x"] * 4,
            "accepted": [["x", "y"]] * 4,
            "exact_match": [float(v == 1) for v in values],
            "f1": values,
        }
        write_table(folder / "answers.parquet", columns, answers_schema("exact_match"))
        found = {"benchmark": "ages", "metric": "f1", "examples": 4, "floor": 0.0}
        (folder / "metrics.json").write_text(json.dumps(found | {"f1": float(np.mean(values)), "f1_stderr": 0.2}))
        models[name] = {"ages": folder}
    run = run_of(of_scores(models))
    dense, row = row_of(run, "dense", "ages"), row_of(run, "tailored", "ages")
    assert (row.metric, dense.accuracy, row.accuracy, row.recovery) == ("f1", 0.5, 0.375, 0.75)
    assert row.recovery_low is not None
    assert row.recovery_low < 0.75
    _, other_row = compare_scores({name: tmp_path / name for name in ("dense", "tailored")})
    assert (other_row["f1"], other_row["difference"]) == (0.375, -0.125)


def test_two_scores_compared(tmp_path: Path) -> None:
    one = scored(tmp_path / "a" / "piqa", hits(50), 0.5)
    other = scored(tmp_path / "b" / "piqa", hits(60), 0.5)
    first, same, better = compare_scores({"one": one, "the same": one, "other": other})
    assert first == same | {"model": "one"}
    assert (first["acc_norm"], first["difference"], first["low"], first["high"]) == (0.5, 0, 0, 0)
    assert (better["model"], better["acc_norm"], better["examples"]) == ("other", 0.6, 100)
    assert better["difference"] == pytest.approx(0.1)
    assert 0 < better["low"] < 0.1 < better["high"] < 0.2
    with pytest.raises(InputError, match="scores: piqa against boolq; allowed: one benchmark"):
        compare_scores({"one": one, "other": scored(tmp_path / "boolq", hits(50), 0.5)})
    with pytest.raises(InputError, match=r"scores of piqa: .*; allowed: scores of the same examples"):
        compare_scores({"one": one, "other": scored(tmp_path / "c" / "piqa", hits(50), 0.5, first=7)})


def test_parquet_has_the_declared_schema_and_reads_back(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    written(given, tmp_path / "out")
    found = pq.read_table(tmp_path / "out" / "recovery.parquet")
    assert found.schema.equals(schema_of(RecoveryRow))
    assert str(found.schema.field("above_floor").type) == "bool"
    assert str(found.schema.field("examples").type) == "int64"
    assert str(found.schema.field("recovery").type) == "double"
    run = run_of(given)
    assert read_recovery(tmp_path / "out") == (list(run.rows), list(run.models.values()))


def test_the_page_says_it_in_words_and_numbers(tmp_path: Path) -> None:
    page = written(inputs(tmp_path), tmp_path / "out")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page)).replace("&#39;", "'")
    assert "tiny, pruned at ratio 0.2" in text
    assert (
        "Pruning removed 20.0 % of all parameters (100,000 before, 80,000 after), and perplexity went from 20.5" in text
    )
    assert "reaches 115.0 % of the dense model's accuracy (mean over 2 benchmarks, 200 examples; 95 % interval" in text
    assert (
        "; 77.6 % when only pruned), and 60.0 % of what the dense model has above its floor (over the 1 of them" in text
    )
    assert "Dense itself is at the floor on boolq (0.420 against 0.620): its recovery says nothing." in text
    assert "0.400 ± 0.049" in text
    assert "over 1 of 2" in text
    assert page.count("<svg") == 1  # bars; no losses were given
    assert re.findall(r">\s*(dense|pruned|tailored|floor)</text>", page) == ["dense", "pruned", "tailored", "floor"]
    assert not re.search("Losses of tuning|held-out examples", text)


def test_nothing_from_outside_is_markup_and_nothing_is_loaded(tmp_path: Path) -> None:
    page = written(everything(tmp_path), tmp_path / "out")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert f"Is {ATTACK}?" not in page
    (prompt,) = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    assert prompt.startswith("Is &lt;script")
    assert prompt.endswith("?\n    ⟦ no⟧  ← right\n    ⟦ yes⟧")  # the context once, no second prompt
    elements = Elements(page)
    assert not elements.open
    assert {"script", "img", "link", "iframe", "object", "foreignobject"}.isdisjoint(tag for tag, _ in elements.found)
    for tag, attributes in elements.found:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action", "data", "style"):
            assert "//" not in (attributes.get(name) or ""), (tag, name)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert page.count("<svg") == 2
    used = {a["href"][1:] for tag, a in elements.found if tag == "use" and a.get("href")}
    assert used <= {a["id"] for _, a in elements.found if "id" in a}


def test_the_same_inputs_make_the_same_files(tmp_path: Path) -> None:
    given = everything(tmp_path)
    for name in ("one", "two"):
        written(given, tmp_path / name)
    pictures = {"accuracy-0.2.png", "losses-0.2.png"}
    assert {path.name for path in (tmp_path / "one").glob("*.png")} == pictures
    for file in ("recovery.parquet", "report.html", "report.md", *pictures):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_markdown_has_the_table(tmp_path: Path) -> None:
    given = everything(tmp_path)
    written(given, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text().replace(NBSP, " ")
    assert text.startswith("# tiny &lt;script&gt;alert(1)&lt;/script&gt;")
    assert ATTACK not in text
    assert "| arc_easy (acc_norm) | 100 | 0.250 | 0.500 ± 0.050 | 0.300 ± 0.046 | 0.400 ± 0.049 |" in text
    assert "Dense itself is at the floor on boolq" in text
    assert "Gained = tailored − pruned, by tuning; recovery = tailored ÷ dense; chance-corrected = " in text
    assert "| Better than no adapter: on 2 held-out train examples accuracy went from 0.000 to 0.500 (+50.0" in text
    assert "| 1.5 s | – |" in text  # a memory that was not measured


def test_markdown_shows_every_picture_and_each_is_small(tmp_path: Path) -> None:
    written(everything(tmp_path), tmp_path / "out")
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (tmp_path / "out" / "report.md").read_text())
    assert shown == ["accuracy-0.2.png", "losses-0.2.png"]
    for name in shown:
        content = (tmp_path / "out" / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < 40_000


def test_without_tailored_or_logs(tmp_path: Path) -> None:
    scores = folders(tmp_path)
    del scores["tailored"]
    page = written(of_scores(scores, 0.2), tmp_path / "out")
    assert f"Without tuning, the pruned model reaches 77.6{NBSP}%" in page
    rows, _ = read_recovery(tmp_path / "out")
    assert {row.model for row in rows} == {"dense", "pruned"}
    assert rows[-1].benchmark == MEAN
    assert rows[-1].accuracy == pytest.approx(0.35)


def tailored_run(tiny: Path, root: Path, dense: ByType[Path] | None = None, **parts: Any) -> RunResults:
    """The results of a run on the tiny model, with the quantised scores of the dense model given."""
    scores = folders(root)
    run = TailoredRun(0.2, MeasuredModel(tiny, None, scores["pruned"]), {}, scores["tailored"], **parts)
    return run_results(MeasuredModel(tiny, None, scores["dense"], quantised=dense or {}), run, {}, 0)


def in_q8_0(root: Path, easy: int, boolq: int, size: int) -> dict[str, dict[str, Path]]:
    """Scores with the weights of a file of so many bytes."""
    scores = {}
    for name, right, floor, metric in (("arc_easy", easy, 0.25, "acc_norm"), ("boolq", boolq, 0.62, "acc")):
        scores[name] = folder = scored(root / name, hits(right), floor, metric)
        found = json.loads((folder / "metrics.json").read_text()) | {"type": "q8_0", "bytes": size}
        (folder / "metrics.json").write_text(json.dumps(found))
    return {"q8_0": scores}


def test_files_of_fewer_bits_stand_beside_the_models(tmp_path: Path, tiny: Path) -> None:
    one = in_q8_0(tmp_path / "dense q8_0", 48, 62, 106_000_000)
    other = in_q8_0(tmp_path / "tailored q8_0", 35, 62, 85_000_000)
    whole = report_of(tailored_run(tiny, tmp_path, dense=one, quantised=other))
    page = written(whole, tmp_path / "out")
    run = run_of(whole)
    dense, tailored = row_of(run, "dense q8_0", MEAN), row_of(run, "tailored q8_0", MEAN)
    assert (dense.bytes, dense.accuracy, dense.chance_corrected) == (106_000_000, 0.55, pytest.approx(0.92))
    assert (tailored.bytes, tailored.accuracy, tailored.chance_corrected) == (85_000_000, 0.485, pytest.approx(0.4))
    assert row_of(run, "tailored", MEAN) == row_of(run_of(inputs(tmp_path / "alone")), "tailored", MEAN)
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "chance- corrected dense q8_0 tailored q8_0" in text
    assert "0.350 ± 0.048 70.0 % of dense" in text
    assert page.count(f"106{NBSP}MB") == 3
    assert "Its weights are dequantised and scored" in page
    assert "| 0.350 ± 0.048 (70.0 % of dense; " in (tmp_path / "out" / "report.md").read_text().replace(NBSP, " ")
    assert "dequantised" not in written(inputs(tmp_path / "none"), tmp_path / "plain")


def test_types_that_some_benchmarks_lack_have_no_mean(tmp_path: Path, tiny: Path) -> None:
    scores = in_q8_0(tmp_path / "q8_0", 48, 62, 106_000_000)["q8_0"]
    run = tailored_run(tiny, tmp_path, dense={"q8_0": {"boolq": scores["boolq"]}})
    assert row_of(run, "dense q8_0", "boolq").accuracy == 0.62
    assert row_of(run, "dense q8_0", MEAN).accuracy is None


def test_dense_alone_and_a_ratio_that_nobody_named(tmp_path: Path, tiny: Path) -> None:
    scores = folders(tmp_path)
    alone = run_results(MeasuredModel(tiny, None, scores["dense"]), None, {}, 0)
    page = written(report_of(alone), tmp_path / "alone")
    assert "<h1>tiny</h1>" in page
    assert {row.ratio for row in read_recovery(tmp_path / "alone")[0]} == {None}
    assert "tailored" in written(of_scores(scores | {"pruned": {}}), tmp_path / "unnamed")


def test_a_benchmark_that_only_some_models_have(tmp_path: Path) -> None:
    scores = folders(tmp_path)
    partial = of_scores(scores | {"tailored": {"arc_easy": scores["tailored"]["arc_easy"]}}, 0.2)
    page = written(partial, tmp_path / "out").replace(NBSP, " ")
    assert "(arc_easy, 100 examples; 95 % interval" in page
    assert "60.0 % when only pruned" in page  # on that benchmark
    run = run_of(partial)
    assert run.row("tailored", "boolq") is None
    mean = row_of(run, "tailored", MEAN)
    assert mean.accuracy is None  # a mean over one benchmark is not to be set beside a mean over two
    assert mean.recovery == pytest.approx(0.8)
    assert mean.recovery_benchmarks == 1


def test_scores_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    dense = folders(tmp_path)["dense"]
    other = {"arc_easy": scored(tmp_path / "other" / "arc_easy", hits(40), 0.25, first=1)}
    with pytest.raises(InputError, match="scores of arc_easy: row 0: example 0 against 1"):
        of_scores({"dense": dense, "tailored": other})
    metric = {"arc_easy": scored(tmp_path / "metric" / "arc_easy", hits(40), 0.25, "acc")}
    with pytest.raises(InputError, match="scores of arc_easy: acc_norm against acc"):
        of_scores({"dense": dense, "tailored": metric})
    (other["arc_easy"] / "metrics.json").write_text('{"metric": "acc", "floor": 0.5}')
    with pytest.raises(InputError, match=r"metrics\.json: floor, metric or its value is missing"):
        of_scores({"dense": other})


def test_dense_without_a_right_answer(tmp_path: Path) -> None:
    scores = {
        name: {"own": scored(tmp_path / name / "own", hits(n), 0.5)} for name, n in (("dense", 0), ("tailored", 9))
    }
    given = of_scores(scores, 0.5)
    row = row_of(run_of(given), "tailored", "own")
    assert (row.recovery, row.recovery_low, row.chance_corrected) == (None, None, None)
    assert "Dense itself is at the floor on own" in written(given, tmp_path / "out")


def test_console_table_fits_a_terminal(tmp_path: Path) -> None:
    first, second = (
        results_at(ratio, folders(tmp_path / str(ratio)), (SIZES[0], replace(SIZES[1], ratio=ratio)))
        for ratio in (0.2, 0.5)
    )
    for runs in ([first], [first, second]):
        out = tmp_path / f"out-{len(runs)}"
        written(report_of(*runs), out)
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(stored_table(out))
        text = console.export_text().replace(NBSP, " ")
        notes = " ".join(text.split())
        line = next(line for line in text.splitlines() if line.startswith("arc_easy"))
        assert re.match(r"arc_easy +0\.500±\.050 +0\.300±\.046 +0\.400±\.049 +80 % \(\d+–\d+\) +60 % \(\d+–\d+\)", line)
        assert "(100,000 before, 80,000 after), and perplexity went from 20.5 to 40.2." in notes
        assert "Dense itself is at the floor on boolq" in notes
        assert ("Ratio 0.5" in text) == (len(runs) == 2)
