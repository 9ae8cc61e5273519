"""The calls that one types in a notebook: the results of the flows, on rows in any form, and errors by argument."""

import re
import warnings
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoModelForCausalLM, AutoTokenizer

import tailored_llama as tl
from helpers import save_worded_llama, words
from pictures import blank_pictures
from tailored_llama.api import calls
from tailored_llama.errors import InputError
from tailored_llama.pipeline import StoreExecutor, steps

SETTINGS = {
    "model.dtype": "float32",
    "calibration.samples": 4,
    "calibration.tokens": 32,
    "tuning.shots": 16,
    "tuning.held_out": 16,
    "tuning.epochs": 1,
}
RATIO = 0.1386  # whole groups reach it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_worded_llama(tmp_path_factory.mktemp("models") / "dense", max_position_embeddings=512)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    texts = words(600).split(" ")
    return [
        {"question": f"{i} {texts[2 * i]}?", "a": texts[2 * i], "b": texts[2 * i + 1], "answer": "ab"[i % 2]}
        for i in range(300)
    ]


@pytest.fixture(scope="module")
def small(model: Path, rows: list[dict[str, Any]]) -> tl.Small:
    return tl.prune(model, RATIO, rows=rows, settings=SETTINGS)


def test_pruned_tuned_compared_saved_and_exported(
    model: Path, small: tl.Small, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    tuned = tl.tune(small, rows, settings=SETTINGS | {"tuning.keep": "always"})
    assert "held-out" in tuned.verdict
    table = tl.compare(model, small, tuned, benchmark=rows, settings=SETTINGS)
    assert table["parameters"].tolist() == [44_320, small.parameters, small.parameters]
    cut = f"dense, {100 * RATIO:g} % removed"
    assert table["model"].tolist() == ["dense", cut, f"{cut}, tuned"]
    assert repr(tuned) == f"{cut}, tuned: {small.parameters:,} parameters"
    assert table["difference"][0] == 0
    assert (table["low"] <= table["difference"]).all()
    assert table["examples"].nunique() == 1

    saved = AutoModelForCausalLM.from_pretrained(tuned.save(tmp_path / "saved"))
    cards = [(folder / "README.md").read_text() for folder in (small.save(tmp_path / "untuned"), tmp_path / "saved")]
    assert ["The model has not been tuned since." in card for card in cards] == [True, False]
    assert ["A LoRA adapter has been merged into it since." in card for card in cards] == [False, True]
    loaded, tokenizer = tuned.load()
    text = tokenizer("one two", return_tensors="pt")
    assert saved(**text).logits.equal(loaded(**text).logits)
    assert tuned.export(tmp_path / "small.gguf", "f16").stat().st_size > 0
    with pytest.raises(InputError, match="is there already"):
        tuned.save(tmp_path / "saved")


def test_rows_in_any_form_are_the_same_rows(model: Path, small: tl.Small, rows: list[dict[str, Any]]) -> None:
    for form in (pd.DataFrame(rows), Dataset.from_list(rows), Dataset.from_list(rows).with_format("pandas")):
        assert tl.prune(model, RATIO, rows=form, settings=SETTINGS).folder == small.folder


def test_texts_with_labels_tune_a_model_in_any_form(model: Path, rows: list[dict[str, Any]]) -> None:
    frame = pd.DataFrame({"text": row["question"], "label": ("no", "yes")[i % 2]} for i, row in enumerate(rows))
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    tuned = tl.tune(model, frame, settings=SETTINGS | {"tuning.keep": "always"})
    assert "held-out" in tuned.verdict
    (own,) = tuned.config.benchmarks
    assert (own.labels, own.context) == (("no", "yes"), "Text: {text}\nLabel:")
    same = tl.tune(model, Dataset.from_pandas(frame, features=features), settings=SETTINGS | {"tuning.keep": "always"})
    assert same.run.open(same.adapter) == tuned.run.open(tuned.adapter)
    chats = pd.DataFrame(
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": label}]}
        for text, label in frame.itertuples(index=False)
    )
    read_back = pd.read_parquet(BytesIO(chats.to_parquet()))  # its lists are arrays
    assert tl.tune(model, read_back, settings=SETTINGS).config.benchmarks[0].labels == ("no", "yes")
    written = tl.tune(model, frame, settings=SETTINGS | {"rows.kind": "written"})
    assert written.config.benchmarks[0].metric == "exact_match"


def test_a_model_in_memory_and_texts_are_enough(model: Path, small: tl.Small, rows: list[dict[str, Any]]) -> None:
    own = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    pruned = tl.prune(own, RATIO, text=[row["question"] for row in rows], settings=SETTINGS)
    assert pruned.parameters == small.parameters


def test_a_store_is_that_of_the_flows(model: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    small = tl.prune(model, RATIO, rows=rows, store=tmp_path / "store", settings=SETTINGS)
    run = StoreExecutor(small.config.store, small.config.execution)
    prompts = steps.render_all(small.config)
    dense = steps.prepare_dense(small.config, prompts)
    assert run.open(steps.prune_to(small.config, dense, RATIO, prompts)) == small.folder


def test_the_smallest_model_comes_with_its_verdict(
    model: Path, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SETTINGS | {"goal.choosing_rows": 30, "goal.types": ["q8_0"], "pruning.ratios": [RATIO]}
    with blank_pictures():
        found = tl.smallest(model, rows, lose_at_most=40, export=tmp_path / "out", settings=own)
    assert "loses less than 40 points on rows, with 95 % confidence" in found.verdict
    assert found.folder == tmp_path / "out" / "rows"
    assert found.certificate
    assert found.certificate["margin_points"] == 40
    assert len(found.table()) == len(found.answer.candidates)
    assert found.verdict.split(" ")[0] in found._repr_html_()

    later = TemporaryDirectory(dir=tmp_path)
    monkeypatch.setattr(calls, "_session", lambda: later)
    with blank_pictures():
        again = tl.smallest(model, rows, lose_at_most=35, export=tmp_path / "again", settings=own)
    assert (found.answer.opening, again.answer.opening) == (1, 2)  # the store of the first call is gone
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"^store: got none, to record .* Not a directory: .*; allowed: a store, or "):
        tl.smallest(model, rows, lose_at_most=40, settings=own)


def test_a_call_leaves_the_warnings_of_the_process_as_they_were(small: tl.Small, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        before = warnings.filters.copy()
        tl.compare(small, benchmark=[{"question": f"{i}?", "a": "x", "b": "y", "answer": "a"} for i in range(9)])
        assert warnings.filters == before
        with pytest.raises(FutureWarning):
            warnings.warn("this goes to the user", FutureWarning, stacklevel=1)


def test_an_error_names_the_argument(model: Path, rows: list[dict[str, Any]]) -> None:
    for call, message in (
        (lambda: tl.prune(model, 2, text=["a"]), "ratio: got 2; allowed: less than 1"),
        (lambda: tl.prune("nowhere", 0.2, text=["a"]), "model nowhere: no such file or folder; allowed: "),
        (lambda: tl.prune(model, 0.2), "text: got both or none of text and rows; allowed: one of them"),
        (lambda: tl.prune(5, 0.2, text=["a"]), "model: got int; allowed: a path, a Hub id, or a model and its "),
        (
            lambda: tl.tune(model, 5),
            "rows: got int; allowed: a list of dicts, a data frame, a Dataset (no DatasetDict), a file, or ",
        ),
        (
            lambda: tl.tune(model, DatasetDict(train=Dataset.from_list(rows))),
            "rows: got DatasetDict; allowed: a list of dicts, a data frame, a Dataset (no DatasetDict), a file, or ",
        ),
        (lambda: tl.smallest(model, rows, 1), "lose_at_most: got 1 with 127 rows of rows to prove on; allowed: "),
    ):
        with pytest.raises(InputError) as refused:
            call()
        assert str(refused.value).startswith(message)


def test_the_page_s_examples_run(
    model: Path, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pd.DataFrame(rows).to_csv("my.csv", index=False)
    pd.DataFrame(rows[:5]).drop(columns="answer").to_csv("new.csv", index=False)
    page = (Path(__file__).parents[3] / "docs" / "reference" / "python.md").read_text()
    assert set(re.findall(r"tailored_llama\.(\w+)", page)) == set(tl.__all__)
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    here = {
        '"smollm2-135m-instruct"': repr(str(model)),
        "ratio=0.2": f"ratio={RATIO}",
        "lose_at_most=5": "lose_at_most=40",
    }
    for written, own in here.items():
        assert written in code
        code = code.replace(written, own)
    with blank_pictures():
        exec(code, names := {})
    assert names["found"].folder.is_dir()
    assert all(row.answer in (row.a, row.b) for row in names["table"].itertuples())
    assert {path.name for path in tmp_path.iterdir()} >= {"small", "small.gguf"}
