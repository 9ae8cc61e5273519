"""Texts, and the calibration sequences drawn from them."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from helpers import load_and_render, write_own_benchmark
from tailored_llama.config import BenchmarkConfig, TextConfig, Work, validate_config
from tailored_llama.data import (
    CalibrationSettings,
    find_text,
    load_calibration,
    load_questions,
    load_texts,
    read_calibration,
    read_prompts,
)
from tailored_llama.data.calibration import CALIBRATION_SCHEMA
from tailored_llama.errors import InputError
from tailored_llama.models import load_tokenizer
from tailored_llama.store import read_table

DOCUMENTS = [f"{name}: " + f"the {name} flows to the sea. " * 8 for name in ("Rhine", "Nile", "Volga", "Po")]


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def write(path: Path, documents: list[Any], column: str = "text") -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, column: d}) + "\n" for i, d in enumerate(documents)))
    elif path.suffix == ".csv":
        pd.DataFrame({"id": range(len(documents)), column: documents}).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame({"id": range(len(documents)), column: documents}).to_parquet(path)
    else:
        path.write_text("\n".join(documents))
    return path


def drawn(benchmarks: Sequence[Any] = ("arc_easy",), seed: int = 0, **calibration: Any) -> CalibrationSettings:
    run = {"benchmarks": list(benchmarks), "seed": seed, "calibration": calibration}
    return CalibrationSettings.of(validate_config(run))


@pytest.mark.parametrize(("count", "samples", "shares"), [(1, 3, [3]), (2, 4, [2, 2]), (3, 4, [2, 1, 1])])
def test_the_questions_of_the_benchmarks_share_the_sequences(count: int, samples: int, shares: list[int]) -> None:
    texts = drawn(["piqa", "arc_easy", "hellaswag"][:count], samples=samples).texts
    assert [text.samples for text in texts] == shares


def calibrate(dense: Path, out: Path, source: Any, seed: int = 0, **changes: Any) -> list[list[int]]:
    source = source if isinstance(source, list) else str(source)
    settings = drawn(seed=seed, source=source, **({"samples": 3, "tokens": 16, "column": "text"} | changes))
    load_calibration(dense, {}, settings=settings, work=Work(out))
    return [list(map(int, row)) for row in read_calibration(out)]


def test_a_long_document_gives_a_window_and_short_ones_are_joined(
    tiny: Path, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    out, source = folder("out"), write(tmp_path / "text.jsonl", [*DOCUMENTS, "A short one.", "And another."])
    sequences = calibrate(tiny, out, source, samples=5, tokens=25)
    rows = read_table(out / "calibration.parquet", CALIBRATION_SCHEMA)["row"].to_pylist()
    assert [len(sequence) for sequence in sequences] == [25] * 5
    assert sorted(rows)[:4] == [0, 1, 2, 3]  # each long document once
    texts = dict(zip(rows, map(load_tokenizer(tiny).decode, sequences), strict=True))
    assert all(texts[row] in DOCUMENTS[row] for row in range(4))
    joined = ("A short one.\n\nAnd another.\n\n", "And another.\n\nA short one.\n\n")
    assert texts[max(rows)] in {text[:25] for text in joined}


def test_the_seed_decides_and_the_place_does_not(tiny: Path, folder: Callable[[str], Path]) -> None:
    one, two, three = folder("one"), folder("two"), folder("three")
    first, second = write(one / "text.jsonl", DOCUMENTS), write(two / "same.jsonl", DOCUMENTS)
    calibrate(tiny, one, first)
    calibrate(tiny, two, second)
    assert (one / "calibration.parquet").read_bytes() == (two / "calibration.parquet").read_bytes()
    assert calibrate(tiny, three, first, seed=1) != calibrate(tiny, one, first, seed=0)


def test_further_windows_are_drawn_where_documents_run_out(
    tiny: Path, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    sequences = calibrate(tiny, folder("out"), write(tmp_path / "text.txt", DOCUMENTS), samples=20)
    assert len(sequences) == 20
    assert len({tuple(sequence) for sequence in sequences}) > 10


def test_a_document_of_just_the_length_is_enough(tiny: Path, folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = write(tmp_path / "text.jsonl", ["0123456789abcdef"])
    assert calibrate(tiny, folder("out"), source, samples=1) == [load_tokenizer(tiny)("0123456789abcdef")["input_ids"]]
    message = f"calibration.tokens: got 19; allowed: at most 18, the tokens of {source}"  # with the blank line
    with pytest.raises(InputError, match=exactly(message)):
        calibrate(tiny, folder("too-long"), source, tokens=19)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_every_type_of_file_is_a_text(tmp_path: Path, suffix: str) -> None:
    documents = ['Ünïcode, "quoted"', "two\nlines", "  ", "NA"]
    path = write(tmp_path / f"text{suffix}", documents)
    expected = ["\n".join(documents)] if suffix == ".txt" else [documents[0], documents[1], "NA"]
    assert load_texts(find_text(TextConfig(source=str(path))), "no downloads") == expected


def test_the_identity_of_a_text_is_its_bytes_and_its_column(tmp_path: Path) -> None:
    def identity(path: Path, column: str = "text") -> dict[str, Any]:
        return find_text(TextConfig(source=str(path), column=column)).identity()

    one, same = write(tmp_path / "one.jsonl", DOCUMENTS), write(tmp_path / "same.jsonl", DOCUMENTS)
    other = write(tmp_path / "other.jsonl", DOCUMENTS[1:])
    assert identity(one) == identity(same)
    assert identity(one) != identity(other)
    assert identity(one) != identity(one, "id")
    plain = write(tmp_path / "one.txt", DOCUMENTS)
    assert identity(plain) == identity(plain, "id")  # a .txt file has no columns


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text.jsonl": (lambda path: write(path, DOCUMENTS, "passage"), "{0}: no column 'text'; present: id, passage"),
    "text.parquet": (lambda path: write(path, DOCUMENTS, "passage"), "{0}: no column 'text'; present: id, passage"),
    "numbers.jsonl": (
        lambda path: write(path, [1, 2]),
        "source {0} (a text): holds no text; allowed: at least one document",
    ),
    "empty.txt": (
        lambda path: path.write_text(" \n"),
        "source {0} (a text): holds no text; allowed: at least one document",
    ),
    "latin.txt": (lambda path: path.write_bytes(b"caf\xe9"), "{0}: not UTF-8 text (byte 3)"),
    "notes.md": (lambda path: path.write_text("x"), "{0}: type .md; allowed: a .csv, .jsonl, .json or .parquet file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_text_says_why(tmp_path: Path, name: str) -> None:
    path, (make, message) = tmp_path / name, WRONG[name]
    make(path)
    with pytest.raises(InputError, match=exactly(message.format(path))):
        load_texts(find_text(TextConfig(source=str(path))), "no downloads")


@pytest.mark.parametrize("source", ["/nowhere/text.txt", "wikitext", "./nowhere/text.txt"])
def test_a_text_that_is_nowhere(source: str) -> None:
    message = (
        f"text.source: got {source!r}, no such file; allowed: boolq, piqa, hellaswag, winogrande, arc_easy, "
        "arc_challenge, openbookqa, csqa, a .txt file, a .csv, .jsonl, .json or .parquet file, or a Hub data set "
        "(owner/name)"
    )
    with pytest.raises(InputError, match=exactly(message)):
        find_text(TextConfig(source=source))


def test_the_training_prompts_of_the_run_are_a_text(tiny: Path, folder: Callable[[str], Path]) -> None:
    benchmark = BenchmarkConfig(**write_own_benchmark(folder("data")))
    out = folder("out")
    prompts = load_and_render(benchmark, folder("rendered"), split="train", shots=8, held_out=8)
    settings = drawn(source="prompts", samples=5, tokens=48)
    load_calibration(tiny, {"colours": prompts}, settings=settings, work=Work(out))
    tokenizer = load_tokenizer(tiny)
    text = "\n\n".join(p.contexts[p.answer] + p.continuations[p.answer] for p in read_prompts(prompts, "shots"))
    windows = [tokenizer.decode(ids) for ids in read_calibration(out)]
    assert len(set(windows)) == 5
    assert all(window in text for window in windows)


def test_questions_are_those_of_every_benchmark_without_answers(tiny: Path, folder: Callable[[str], Path]) -> None:
    tables = [write_own_benchmark(folder(name)) | {"name": name} for name in ("first", "second")]
    settings = drawn(tables, samples=4, tokens=48)
    assert [(text.source.name, text.samples) for text in settings.texts] == [
        ("questions of first", 2),
        ("questions of second", 2),
    ]
    load_calibration(tiny, {}, settings=settings, work=Work(out := folder("out")))
    questions = load_questions(BenchmarkConfig(**tables[0]), "no downloads")
    text = "\n\n".join(questions.values())
    assert len(questions) > 10
    tokenizer = load_tokenizer(tiny)
    for window in (tokenizer.decode(ids) for ids in read_calibration(out)):
        inside = window.split("\n\n")[1:-1]
        assert inside
        assert all(part in text for part in inside)


def test_a_run_without_train_rows_calibrates_on_boolq_s_passages(folder: Callable[[str], Path]) -> None:
    only = write_own_benchmark(folder("data"))
    del only["train"]
    (text,) = drawn([only]).texts
    assert (text.source.name, text.source.kind, text.source.text.column) == ("boolq", "benchmark", "passage")
