"""The report of a search for the smallest model, and its certificate: words, figures, and what is escaped."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tailored_llama.config import SmallestConfig
from tailored_llama.errors import InputError
from tailored_llama.evaluation import Answer, CandidateFigures, LossTest, RowSet, read_answer
from tailored_llama.evaluation import noninferiority_test as prove  # pytest would collect it by its own name
from tailored_llama.evaluation.statistics import Answers
from tailored_llama.reports import certificate_of, stored_table, verdict, write_smallest
from tailored_llama.reports.cards import certificate_section
from tailored_llama.reports.smallest import _candidates, _picture
from tailored_llama.store import Manifest

DENSE, QUANTISED, HALF, HALF_SMALL = range(4)
EVIL = "<script>x</script>"


def loss(both: int, only_dense: int, only_small: int, neither: int) -> LossTest:
    rows = np.arange(both + only_dense + only_small + neither)
    dense = np.repeat([1.0, 1.0, 0.0, 0.0], (both, only_dense, only_small, neither))
    small = np.repeat([1.0, 0.0, 1.0, 0.0], (both, only_dense, only_small, neither))
    return prove(Answers(rows, rows, dense), Answers(rows, rows, small), 0.03, 0.04)


GOOD, LARGE, WIDE = loss(510, 38, 33, 640), loss(400, 90, 50, 681), loss(150, 15, 12, 123)


def candidate(ratio: float, kind: str, size: float, lost: float, names: Sequence[str]) -> CandidateFigures:
    count = round(size * 1e6)
    losses = dict.fromkeys(names, lost)
    return CandidateFigures("google/gemma-3-270m", ratio, kind, False, bool(ratio), 10**8, count, count, losses, lost)


def found(
    order: Sequence[int], tests: Sequence[Mapping[str, LossTest]], names: Sequence[str] = ("csqa",), **changes: Any
) -> Answer:
    sizes = ((0, "bf16", 539, 0.0), (0, "q8_0", 288, 0.002), (0.5, "q8_0", 151, 0.011), (0.5, "q4_0", 92, 0.02))
    candidates = [candidate(*size, names) for size in sizes]
    sets = {name: {"choosing": RowSet(300, "ab" * 32), "proving": RowSet(1221, "cd" * 32)} for name in names}
    opening = 1 if tests else None
    return replace(
        Answer(SmallestConfig().goal, "the dense model, tuned", candidates, order, tests, opening, sets, DENSE),
        **changes,
    )


@pytest.fixture
def proven() -> Answer:
    return found([DENSE, HALF_SMALL], [{"csqa": loss(548, 0, 0, 673)}, {"csqa": GOOD}], failed={"70 %": f"{EVIL} died"})


def text(answer: Answer) -> str:
    return verdict(answer).replace("\N{NO-BREAK SPACE}", " ")


def test_a_proven_answer_has_one_sentence_then_four_figures_then_what_was_compared(proven: Answer) -> None:
    assert text(proven).splitlines() == [
        "Proven: a pruned model loses less than 3 points on csqa, with 95 % confidence.",
        "size: 92 MB",
        "parameters removed: 50 %",
        "measured loss on 1,221 rows: 0.4 points",
        f"largest loss not excluded: {100 * GOOD.bound:.2f} points",
        "The model is google/gemma-3-270m, 50 % removed, tuned, q4_0. The reference is the dense model, tuned.",
    ]


def test_a_dense_answer_says_not_to_prune() -> None:
    answer = found([DENSE, QUANTISED, HALF], [{"csqa": GOOD}, {"csqa": GOOD}, {"csqa": LARGE}])
    assert text(answer).startswith(
        "Do not prune, quantise: the dense model in q8_0 loses less than 3 points on csqa, with 95 % confidence.\n"
        "size: 288 MB\nparameters removed: none\n"
    )
    whole = replace(answer, order=[DENSE, QUANTISED], tests=[{"csqa": GOOD}, {"csqa": LARGE}])
    assert text(whole).startswith("Nothing smaller is proven: the dense model in 16 bits loses less than 3 points")


def test_where_nothing_is_proven_it_says_what_is_missing() -> None:
    wide, large, none = found([DENSE], [{"csqa": WIDE}]), found([DENSE], [{"csqa": LARGE}]), found([], [])
    assert "The nearest is google/gemma-3-270m, dense, not tuned, bf16: it loses 1.0 points on the proving" in text(
        wide
    )
    assert f"instead of 300; or a margin above {100 * WIDE.bound:.2f} points, or a better base model." in text(wide)
    rows = int(text(wide).split("about ")[1].split(" rows")[0].replace(",", ""))
    scale = round(rows / 300)  # so many rows in these shares prove it: more than four chances in five need
    assert 300 < rows < 3000
    assert loss(150 * scale, 15 * scale, 12 * scale, 123 * scale).proven
    for answer in (large, none):
        assert "More rows will not help, as it loses too much." in text(answer)
        assert "to prove on" not in text(answer)


def test_the_worst_of_several_benchmarks_decides() -> None:
    both, one = {"csqa": GOOD, "piqa": GOOD}, {"csqa": GOOD, "piqa": WIDE}
    answer = found([DENSE, HALF], [both, one], ("csqa", "piqa"))
    assert "loses less than 3 points on each of csqa and piqa, with" in text(answer)
    assert "measured loss on 1,221 rows of csqa, the worst: 0.4 points" in text(answer)
    outcomes = [row.cells[-1].text for row in _candidates(answer).rows]
    assert outcomes == ["the answer", "not tested", "not proven", "not tested"]
    failed = text(replace(answer, order=[HALF], tests=[one]))
    assert "rows of piqa to prove on, instead of 300" in failed
    assert "csqa" not in failed


def test_the_page_the_tables_and_the_files(proven: Answer, tmp_path: Path) -> None:
    config = SmallestConfig.model_validate({"benchmarks": ["piqa"], "model": {"source": EVIL}})
    rows = [("csqa", f"{EVIL} number {number}.") for number in range(3)]
    costs = [
        Manifest(stage, 1, "", {}, {}, {}, {}, seconds, 1, {})
        for stage, seconds in (("prune", 60), ("prune", 61), ("score", 5))
    ]
    write_smallest(config, proven, rows, costs, out=tmp_path)
    assert read_answer(tmp_path) == proven
    page, markdown = (tmp_path / "smallest.html").read_text(), (tmp_path / "smallest.md").read_text()
    assert "<script" not in page + markdown
    assert "number 2." in page
    assert "lose_at_most = 3.0" in page
    assert '<td class="text">2 artifacts</td>\n<td>2 min 01 s</td>' in page
    assert ">1 artifact<" in page
    assert f'>300<span class="under">{"ab" * 6}</span></td>' in page  # the choosing rows
    assert "<dt>Proof</dt>" in page
    lead = page[page.index('class="lead"') : page.index("What was tried")]
    assert (
        lead.index("loses less than 3 points")
        < lead.index("<dd>92\N{NO-BREAK SPACE}MB</dd>")
        < lead.index("The reference")
    )
    assert "- size: 92\N{NO-BREAK SPACE}MB\n" in markdown
    assert ">92\N{NO-BREAK SPACE}MB<" in page[page.index("<svg") : page.index("</svg>")]
    assert "](frontier.png)" in markdown
    assert (tmp_path / "frontier.png").is_file()
    console = Console(width=80, record=True)
    console.print(stored_table(tmp_path))
    shown = " ".join(console.export_text().replace("\N{NO-BREAK SPACE}", " ").split())
    assert "gemma-3-270m 50 % q4_0 92 MB 2.0 the answer" in shown
    assert "loses less than 3 points on csqa" in shown
    assert f"70 % failed: {EVIL} died" in shown


def test_a_search_without_a_test_says_that_the_proving_rows_are_unspent(tmp_path: Path) -> None:
    write_smallest(SmallestConfig(benchmarks=("piqa",)), found([], []), [], [], out=tmp_path)
    page = (tmp_path / "smallest.html").read_text()
    assert "No candidate was good enough to open the proving rows." in page
    assert "tested one after the other" not in page


def test_the_dense_lines_of_several_bases_differ(proven: Answer) -> None:
    other = [replace(one, base="HuggingFaceTB/SmolLM2-135M") for one in proven.candidates]
    types = [one for one in (*proven.candidates, *other) if one.type == "q8_0"]  # two lines for each base
    picture = _picture(replace(proven, candidates=types, order=[], tests=[])).__html__()
    assert len(set(re.findall(r'stroke-dasharray: ([\d., ]+); [^"]*var\(--dense\)', picture))) == 2


def test_no_answer_is_named(tmp_path: Path) -> None:
    (tmp_path / "answer.json").write_text('{"goal": {}}')
    with pytest.raises(InputError, match=r"answer\.json: missing or not the answer of a search"):
        read_answer(tmp_path)


def test_a_certificate_has_the_figures_of_the_tests(proven: Answer) -> None:
    config = SmallestConfig(benchmarks=("piqa",))
    certificate = json.loads(json.dumps(certificate_of(proven, config, {"file": "x.gguf", "bytes": 92_000_000})))
    assert certificate["claim"].endswith("with 95 % confidence, compared with the dense model, tuned.")
    figures = asdict(GOOD) | {"loss": GOOD.loss, "proven": True}
    for name in ("looks", "missing"):  # of rows that had no labels
        del figures[name]
    assert certificate["benchmarks"] == {"csqa": figures}
    assert [step["proven"] for step in certificate["sequence"]] == [True, True]
    assert certificate["sets"]["csqa"]["proving"] == {"rows": 1221, "sha256": "cd" * 32}
    assert (certificate["margin_points"], certificate["level"], certificate["opening"]) == (3.0, 0.04, 1)
    assert certificate["model"]["file"] == "x.gguf"
    section = certificate_section(proven, certificate).replace("\N{NO-BREAK SPACE}", " ")
    figures = f"0.4 | {100 * GOOD.bound:.2f} | {GOOD.p:.4f}"
    assert f"| csqa | 1,221 | 510 | 38 | 33 | 640 | {figures} |" in section
    assert "tailored-llama verify MODEL my.csv" in section
    with pytest.raises(ValueError, match="no candidate is proven"):
        certificate_of(found([], []), config, {})
