"""A search whose proving rows have no labels, on a tiny model: it asks, waits, goes on, and is proven by few."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compositions import compose, run_command
from few_labels import few_label_search, tune_trimmed_models
from helpers import as_toml, save_worded_llama
from llama_server import llama_server
from tailored_llama import evaluation
from tailored_llama.cli.main import app
from tailored_llama.config import SmallestConfig, build_config
from tailored_llama.data import NONE, Asked, read_asked, write_asked
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.errors import InputError
from tailored_llama.evaluation import Answer, read_answer
from tailored_llama.pipeline import COMPOSITIONS, WaitingForLabels, plan_run
from tailored_llama.pipeline.smallest import check_smallest
from tailored_llama.store import read_table


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_worded_llama(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The folder of a search that has made its candidates and has labels to choose with; nothing is proven yet."""
    run = few_label_search(folder := tmp_path_factory.mktemp("searched"), model)
    with pytest.MonkeyPatch.context() as patch:
        tune_trimmed_models(patch)
        patch.setattr(evaluation, "sequence", lambda found, margin: [])
        if asked_by(run):
            label(folder / "to-label.csv")
        answer_to(run)
    return folder


@pytest.fixture
def run(tmp_path: Path, model: Path, searched: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A search that finds its candidates, and any labels to choose with."""
    tune_trimmed_models(monkeypatch)
    shutil.copytree(searched, tmp_path, dirs_exist_ok=True)
    return few_label_search(tmp_path, model)


def with_goal(run: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return run | {"goal": run["goal"] | changes}


def answer_to(run: dict[str, Any]) -> Answer:
    return read_answer(compose("smallest", build_config(SmallestConfig, run)))


def label(file: Path, upto: int | None = None, answer: str = NONE) -> None:
    """Answer the open rows of a file, or so many of them; if none of the answers is right, no model has lost."""
    rows = read_asked(file)
    places = [place for place, row in enumerate(rows) if not row.answer][:upto]
    write_asked(file, [replace(row, answer=answer) if place in places else row for place, row in enumerate(rows)])


def ask_for_the_last(run: dict[str, Any], file: Path) -> None:
    """Label all rows of the first candidate, so that those of the last one are asked for, which are many."""
    for _ in range(2):
        with pytest.raises(WaitingForLabels):
            answer_to(run)
        if len(still_open(file)) > 5:
            break
        label(file)


def still_open(file: Path) -> list[Asked]:
    return [row for row in read_asked(file) if not row.answer]


def finished(run: dict[str, Any], file: Path) -> tuple[Answer, int]:
    """The answer of a search that gets each label it asks for; and how often it asked."""
    for rounds in range(10):
        try:
            return answer_to(run), rounds
        except WaitingForLabels:
            label(file)
    raise AssertionError("it asks for ever")


def verify(*arguments: object) -> tuple[int, str]:
    ended = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["verify", *map(str, arguments)])
    return (2, str(ended.exception)) if isinstance(ended.exception, InputError) else (ended.exit_code, ended.stdout)


def test_a_search_asks_for_the_labels_of_differing_rows_and_then_proves(run: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "to-label.csv"
    with pytest.raises(WaitingForLabels) as waiting:
        answer_to(run)
    asked = still_open(file)
    assert f"{len(asked)} rows need a label" in str(waiting.value)
    assert not any("Label" in row.row for row in asked)  # of the prompt, the user's own text
    assert {row.answers for row in asked} == {("a", "b")}
    assert [row.part for row in asked] == sorted(row.part for row in asked)
    assert not (tmp_path / "small").exists()
    page = file.with_suffix(".html").read_text()
    assert json.dumps(asked[0].row)[1:-1] in page
    answer, _ = finished(run, file)
    assert answer.proven is not None
    (test,) = answer.tests[-1].values()
    assert 0 < test.labels <= len(answer.labels["job"])
    assert test.rows < test.looks[-1].rows  # it took no more looks than it needed


@pytest.fixture
def choosing(run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A search for one point, in which every candidate differs on more rows; it has asked for labels to choose with."""
    run = with_goal(run, lose_at_most=1, even_if_unprovable=True)
    (tmp_path / "to-label.csv").unlink(missing_ok=True)
    assert "to choose a candidate" in asked_by(run)
    assert {row.part for row in read_asked(tmp_path / "to-label.csv")} == {0}
    return run


def asked_by(run: dict[str, Any]) -> str:
    """What a search says when it asks for labels; empty if it asks for none."""
    try:
        answer_to(run)
    except WaitingForLabels as waiting:
        return str(waiting)
    return ""


def test_no_row_to_choose_with_is_one_to_prove_on(choosing: dict[str, Any], tmp_path: Path) -> None:
    own = build_config(SmallestConfig, choosing).benchmarks[0]
    contexts = "\n".join(example.fields["context"] for example in load_examples(own, "evaluation", ""))
    assert not any(row.row in contexts for row in read_asked(tmp_path / "to-label.csv"))


def test_labels_to_choose_with_are_asked_for_once(choosing: dict[str, Any], tmp_path: Path) -> None:
    label(tmp_path / "to-label.csv", 1)
    assert "to choose a candidate" not in asked_by(choosing)


def test_without_asking_none_are_asked_for(choosing: dict[str, Any]) -> None:
    assert not asked_by(with_goal(choosing, ask=False))


def test_what_labels_to_choose_with_say_moves_the_loss(choosing: dict[str, Any], tmp_path: Path) -> None:
    losses, given = list[float](), read_asked(tmp_path / "to-label.csv")
    for answer in ("a", "b"):
        write_asked(tmp_path / "to-label.csv", [replace(row, answer=answer) for row in given])
        losses.append(max(own.loss for own in answer_to(with_goal(choosing, ask=False)).candidates))
    assert losses[0] != losses[1]


def test_too_few_labelled_rows_are_refused_before_any_work(tmp_path: Path) -> None:
    run = few_label_search(tmp_path, tmp_path / "not fetched yet")
    header, *rows = (tmp_path / "job.csv").read_text().splitlines()
    (tmp_path / "job.csv").write_text("\n".join([header, *rows[:12]]))
    with pytest.raises(InputError) as caught:
        check_smallest(build_config(SmallestConfig, run))
    assert " labelled rows to choose with; allowed: at least 10, so about 60 rows with an answer in " in str(
        caught.value
    )
    assert str(caught.value).endswith("job.csv, of which 75% to tune on, 25% to choose with")


def test_a_plan_asks_for_nothing(choosing: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "to-label.csv").unlink()
    planned = plan_run(COMPOSITIONS["smallest"].compose, build_config(SmallestConfig, choosing))
    assert planned.open_after == "the candidates' choice"
    assert not (tmp_path / "to-label.csv").exists()


def test_a_label_of_a_row_that_is_not_looked_at_any_more_is_no_error(choosing: dict[str, Any], tmp_path: Path) -> None:
    label(tmp_path / "to-label.csv")
    given = read_asked(tmp_path / "to-label.csv")
    answer_to(with_goal(choosing, ask=False, choosing_rows=30))  # those that are labelled are enough
    assert read_asked(tmp_path / "to-label.csv") == given


def test_the_proof_has_the_loss_of_all_labels(run: dict[str, Any], tmp_path: Path) -> None:
    few, _ = finished(run, tmp_path / "to-label.csv")
    assert few.proven is not None
    stated = json.loads((tmp_path / "small" / "job" / "certificate.json").read_text())["benchmarks"]["job"]
    proof = read_table(tmp_path / "small" / "job" / "proof.parquet").to_pylist()
    assert len(proof) == stated["rows"]
    assert stated["loss"] == sum(row["dense"] - row["small"] for row in proof) == 0
    assert stated["counts"]["neither"] > 0


def test_a_half_finished_file_is_taken(run: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "to-label.csv"
    ask_for_the_last(run, file)
    rows, asked = len(read_asked(file)), len(still_open(file))
    label(file, 2)
    with pytest.raises(WaitingForLabels):
        answer_to(run)
    assert (len(read_asked(file)), len(still_open(file))) == (rows, asked - 2)


def test_without_asking_missing_labels_count_as_lost(run: dict[str, Any]) -> None:
    answer = answer_to(with_goal(run, ask=False))
    (test,) = answer.tests[-1].values()
    assert not test.proven
    assert test.counts
    assert test.missing == test.counts.only_dense > 0


def test_a_margin_for_wrong_labels_is_smaller(run: dict[str, Any], tmp_path: Path) -> None:
    answer, _ = finished(with_goal(run, label_errors=0.1), tmp_path / "to-label.csv")
    assert [test.margin for test in answer.tests[0].values()] == [pytest.approx(0.08)]


def test_the_certificate_is_verified_with_both_files_and_refused_if_it_was_changed(
    run: dict[str, Any], tmp_path: Path
) -> None:
    answer, _ = finished(run, tmp_path / "to-label.csv")
    assert answer.proven is not None
    shipped, files = tmp_path / "small" / "job", (tmp_path / "job.csv", tmp_path / "inputs.csv")
    status, told = verify(shipped, *files)
    assert (status, "less than 10 points lost" in told) == (0, True), told
    assert "the labels that were asked for, which are the recorded ones" in told
    with llama_server(next(shipped.glob("*.gguf"))) as server:
        status, told = verify(shipped, *files, "--url", f"{server.url}/v1")
    assert (status, "\nserved as certified" in told) == (0, True), told
    assert verify(shipped, *files, "--dense", run["model"]["source"])[0] in (0, 1)  # the reference was tuned
    assert "allowed: 2 in the place of" in verify(shipped, files[0])[1]
    assert "answered alike" in (shipped / "README.md").read_text()
    texts = [row["label"] for row in read_table(shipped / "asked.parquet").to_pylist()]
    assert all(text is None or len(text) == 64 for text in texts)  # no label leaves as text
    assert "none of these" not in (shipped / "manifest.json").read_text()

    true = json.loads((shipped / "certificate.json").read_text())
    looks = true["benchmarks"]["job"]["looks"]
    for change, message in (
        ({"looks": looks[:-1]}, "looks: got ["),
        ({"looks": []}, "looks: got []; allowed: "),
        ({"looks": [{**looks[0], "rows": looks[0]["rows"] + 1}, *looks[1:]]}, "looks: got "),
        ({"looks": [{**look, "level": 0.5} for look in looks]}, "nominal: got "),
        (
            {"nominal": 0.04, "looks": [{**look, "level": 0.04} for look in looks]},
            "nominal: got 0.04; allowed: at most",
        ),
        ({"missing": true["benchmarks"]["job"]["rows"] + 1}, "missing: got "),
    ):
        changed = json.loads(json.dumps(true))
        for tests in (changed["benchmarks"], *(step["benchmarks"] for step in changed["sequence"])):
            tests["job"] |= change
        (shipped / "certificate.json").write_text(json.dumps(changed))
        status, told = verify(shipped, *files)
        assert (status, message in told) == (2, True), (change, told)


def test_what_cannot_go_well_is_refused_before_any_work(run: dict[str, Any], tmp_path: Path) -> None:
    mixed = run["benchmarks"] + ["csqa"]
    for change, message in (
        ({"benchmarks": mixed}, "benchmarks: job alone with unlabelled rows; allowed: all of them, or none"),
        (with_goal(run, labels=str(tmp_path / "no" / "to-label.csv")), "allowed: a file in a folder that is there"),
        (with_goal(run, labels="to-label.txt"), "goal.labels: got 'to-label.txt'; allowed: "),
    ):
        with pytest.raises(InputError) as error:
            check_smallest(build_config(SmallestConfig, run | change))
        assert message in str(error.value)
    write_asked(tmp_path / "to-label.csv", [Asked("other", 1, "text", ("a", "b"))])
    with pytest.raises(InputError, match="which asks for labels of 'other'; allowed: a file of its own for each"):
        check_smallest(build_config(SmallestConfig, run))


def test_the_same_rows_with_another_plan_are_opened_again(run: dict[str, Any], tmp_path: Path) -> None:
    first, _ = finished(run, tmp_path / "to-label.csv")
    second, _ = finished(with_goal(run, lose_at_most=12), tmp_path / "to-label.csv")
    assert (first.opening, second.opening) == (1, 2)


def test_a_second_opening_looks_at_enough_rows_for_its_stricter_level(run: dict[str, Any], tmp_path: Path) -> None:
    first, _ = finished(with_goal(run, lose_at_most=19), tmp_path / "to-label.csv")
    second, _ = finished(with_goal(run, lose_at_most=20), tmp_path / "to-label.csv")
    assert (first.opening, second.opening) == (1, 2)
    planned = [answer.tests[0]["job"].looks[-1].rows for answer in (first, second)]
    assert planned[0] < planned[1]  # at the same level, a margin of 20 would take fewer


def test_labels_of_other_rows_end_the_search_before_any_test(run: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WaitingForLabels):
        answer_to(run)
    file = tmp_path / "to-label.csv"
    *others, last = read_asked(file)
    write_asked(file, [*others, replace(last, row=f"not {last.row}")])
    with pytest.raises(InputError, match=rf"row {len(others)}: got '.* which was not asked for, or was changed"):
        answer_to(run)


def test_the_command_waits_with_a_status_of_its_own(run: dict[str, Any], tmp_path: Path) -> None:
    run["store"]["reports"] = str(tmp_path / "reports")
    (tmp_path / "run.toml").write_text(as_toml(run))
    status, told, _ = run_command(tmp_path / "run.toml")
    assert (status, "rows need a label" in told) == (3, True)
    while status == 3:
        label(tmp_path / "to-label.csv")
        status, told, _ = run_command(tmp_path / "run.toml")
    assert status == 0, told
    assert "labels that were asked for and given" in told


def test_a_person_labels_in_the_terminal(run: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "to-label.csv"
    ask_for_the_last(run, file)
    before = len(read_asked(file)) - len(still_open(file))
    ended = CliRunner().invoke(app, ["label", str(file)], input="7\n1\nB\nn\n\nq\n")
    assert "got '7'; allowed: 1, 2, n, or an answer" in ended.stdout
    assert [row.answer for row in read_asked(file)][before:][:5] == ["a", "b", "none of these", "", ""]
    assert f"{before + 3} rows are labelled" in ended.stdout
    count = before + 3
    again = CliRunner().invoke(app, ["label", str(file), "--again", str(count)], input="n\n" * count)
    assert f"2 of {count} answers differ from the first ones: about {1 / count:.1%} of the labels" in again.stdout
    with pytest.raises(WaitingForLabels):
        answer_to(run)
