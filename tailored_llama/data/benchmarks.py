"""Benchmarks: the seven of the paper and custom ones, all as plain Examples.

Known deviation: the embedded HellaSwag train split is already cleaned, by a rule that writes ". [title]" as ". " where
lm-evaluation-harness (and so the evaluation split here) writes ".. ". On the validation split the two rules differ in
3,073 of 10,042 documents, by full stops and spaces only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tailored_llama.config import OWN, UNKNOWN, WRITTEN, BenchmarkConfig, Metric, Work, in_form, is_answered, is_written
from tailored_llama.data.builtin import BUILTIN
from tailored_llama.data.custom import check_benchmark, custom_columns, custom_content, custom_parts
from tailored_llama.data.splits import (
    LABELLED,
    PURPOSE,
    SHARES,
    SPLITS,
    BenchmarkSource,
    Split,
    check_column,
    divide,
    divide_unlabelled,
    embedded_rows,
    find_split,
)
from tailored_llama.errors import InputError
from tailored_llama.files import read_file
from tailored_llama.store import read_table, write_table

UNLABELLED = -1  # the answer of an example whose right choice nobody knows yet
_TEXT, _NUMBER = pa.string(), pa.int32()
EXAMPLES_SCHEMA = pa.schema(
    {"split": _TEXT, "example": _NUMBER, "fields": pa.map_(_TEXT, _TEXT), "choices": pa.list_(_TEXT), "answer": _NUMBER}
)


@dataclass(frozen=True)
class Example:
    """One question: its row in the official split, its named texts, the choices, and the index of the right choice.

    If nobody knows the right one (`UNLABELLED`), a written answer has one choice, which means nothing.
    """

    index: int
    fields: dict[str, str]
    choices: tuple[str, ...]
    answer: int


def headline_metric(benchmark: BenchmarkConfig) -> Metric:
    """The configured metric, else the benchmark's default: acc for BoolQ, WinoGrande and labels, else acc_norm."""
    builtin = BUILTIN.get(benchmark.name)
    return benchmark.metric or (builtin.metric if builtin else "acc" if benchmark.labels else "acc_norm")


def load_examples(benchmark: BenchmarkConfig, split: Split, downloads: str) -> list[Example]:
    """The examples of one split, from the embedded wheel, the Hub or a local file, in the split's order.

    Another split's example is left out if its texts (choices in any order) are also in the evaluation split or earlier
    in its own. PIQA, ARC-easy and OpenBookQA have such examples, and a scored example must not be one that is tuned on.
    InputError: an unknown benchmark; a missing file, split or column; an empty split; a bad row.
    """
    examples = _read(benchmark, split, downloads)
    if split == "evaluation":
        return examples
    return _unseen(benchmark, examples, _read(benchmark, "evaluation", downloads))


def benchmark_texts(benchmark: BenchmarkConfig, split: str, column: str, downloads: str) -> list[str]:
    """The distinct texts of one field, such as BoolQ's passage, in order, for calibration or perplexity.

    Train leaves out every text that is also in another split, such as 720 of BoolQ's 7,929 train passages: perplexity
    must not be measured on what a model was calibrated on. Any other split means the evaluation split.
    """
    check_text_of(benchmark, split, column)
    parts = parts_of(benchmark) if split == "train" else ("evaluation",)
    texts = {part: dict.fromkeys(e.fields[column] for e in _read(benchmark, part, downloads)) for part in parts}
    if split != "train":
        return list(texts["evaluation"])
    train = texts.pop("train")
    return [text for text in train if not any(text in own for own in texts.values())]


def load_questions(benchmark: BenchmarkConfig, downloads: str, choices: bool = False) -> dict[int, str]:
    """The question of every train example by the example's index, never its answer; its choices as well, if asked for.

    A choice has the space before it that it has in a prompt: with a space, a word is another token.
    Repeated ones are left out, and those with a text of another split, such as one of BoolQ's passages.
    """
    others = [part for part in parts_of(benchmark) if part != "train"]
    seen = {text for part in others for example in _read(benchmark, part, downloads) for text in _asked(example)}
    questions: dict[str, int] = {}
    for example in _read(benchmark, "train", downloads):
        texts = _asked(example)
        if not seen.intersection(texts):
            written = "".join(f" {choice}" for choice in example.choices) if choices else ""
            questions.setdefault("\n".join(texts) + written, example.index)
    return {index: question for question, index in questions.items()}


def _asked(example: Example) -> tuple[str, ...]:
    """The texts of a question; messages have a further field, which says how to ask."""
    return (example.fields["context"],) if "messages" in example.fields else tuple(example.fields.values())


def check_text_of(benchmark: BenchmarkConfig, split: str, column: str) -> None:
    """Check, without reading any data, that one of the seven has this split and this field."""
    allowed = ("train", "evaluation", "validation", "test")
    if split not in allowed:
        raise InputError(f"split of {benchmark.name}: got {split!r}; allowed: {', '.join(allowed)}")
    check_column(f"column of {benchmark.name}", column, BUILTIN[benchmark.name].fields)


def _read(benchmark: BenchmarkConfig, split: Split, downloads: str) -> list[Example]:
    """Every row of a split as an example; of rows that are divided, those of one part."""
    check_benchmark(benchmark)
    where = f"benchmarks.{benchmark.name}: "
    source = find_split(benchmark, split)
    if source.kind == "wheel":
        examples = [Example(index, *parts) for index, parts in embedded_rows(source, downloads)]
        return _part(benchmark, split, examples, [_texts(example) for example in examples])
    where += source.path.name if source.kind == "file" else f"{benchmark.source} {source.name}"
    table = source.rows()
    if not table:
        raise InputError(f"{where}: holds no rows; allowed: at least one")
    if benchmark.form:
        table = in_form(table, benchmark.form, where, bool(benchmark.unlabelled))
    for column in custom_columns(benchmark):
        check_column(where, column, table[0])
    answered = {
        i: row for i, row in enumerate(table) if not benchmark.unlabelled or is_answered(row[str(benchmark.answer)])
    }
    examples = [_example(benchmark, f"{where} row", index, row) for index, row in answered.items()]
    contents = [custom_content(benchmark, table[example.index], example.choices) for example in examples]
    unlabelled = list[Example]()
    if benchmark.unlabelled and split != "train":
        own = {i: row for i, row in enumerate(table) if i not in answered}
        unlabelled = _unlabelled(benchmark, split, own, len(table), contents)
    return _part(benchmark, split, examples, contents, unlabelled)


def _part(
    benchmark: BenchmarkConfig,
    split: Split,
    examples: Sequence[Example],
    contents: Sequence[Sequence[str]],
    unlabelled: Sequence[Example] = (),
) -> list[Example]:
    """The examples of one part, if their rows are divided, with those of that part that have no answer."""
    if not benchmark.data and (split == "evaluation" or not benchmark.is_divided):
        return list(examples)
    divided = divide(contents, SHARES if benchmark.data and not benchmark.unlabelled else LABELLED)
    if not divided[split] and not unlabelled:
        field = "data" if benchmark.data else "train"
        raise InputError(
            f"benchmarks.{benchmark.name}.{field}: got {getattr(benchmark, field)!r}, whose "
            f"{sum(map(len, divided.values()))} different rows leave none {PURPOSE[split]}; allowed: a file with rows "
            "for every part, 150 or more"
        )
    return [*(examples[i] for i in divided[split]), *unlabelled]


def _unlabelled(
    benchmark: BenchmarkConfig,
    split: Split,
    own: Mapping[int, dict[str, Any]],
    start: int,
    labelled: Sequence[Sequence[str]],
) -> list[Example]:
    """A part's rows without an answer, by their hashes: of `own`, by index, and of the file, from `start` on.

    Rows with the contents of `labelled` ones are left out. Answers in the file are not read.
    """
    path, columns = Path(str(benchmark.unlabelled)).expanduser(), custom_columns(benchmark)
    where, rows = f"benchmarks.{benchmark.name}.unlabelled: {path.name}", dict(own)
    if benchmark.unlabelled != OWN:
        others = read_file(path)
        others = in_form(others, benchmark.form, where, True) if benchmark.form else others
        for column in columns[:-1]:
            check_column(where, column, others[0])
        rows |= enumerate(others, start)
    unknown = benchmark.labels[0] if benchmark.labels else UNKNOWN[WRITTEN.get(benchmark.metric, "choices")]
    examples = [_example(benchmark, f"{where} row", i, {**row, columns[-1]: unknown}) for i, row in rows.items()]
    contents = [custom_content(benchmark, rows[example.index], example.choices) for example in examples]
    divided = divide_unlabelled(contents, labelled)
    if not divided["evaluation"]:
        raise InputError(f"{where}: got no row without an answer to prove on; allowed: some that are in no other part")
    return [replace(examples[i], answer=UNLABELLED) for i in divided[split]]


def has_train(benchmark: BenchmarkConfig) -> bool:
    """Return whether a benchmark has a train split, without reading any data."""
    return benchmark.name in BUILTIN or any((benchmark.source, benchmark.train, benchmark.data))


def parts_of(benchmark: BenchmarkConfig) -> Sequence[Split]:
    """The splits that a benchmark has rows in, without reading any data."""
    divided = benchmark.data or benchmark.is_divided
    return (*PURPOSE,) if divided and has_train(benchmark) else SPLITS if has_train(benchmark) else ("evaluation",)


def _unseen(benchmark: BenchmarkConfig, train: list[Example], evaluation: list[Example]) -> list[Example]:
    seen, kept = {_texts(example) for example in evaluation}, dict[tuple[Any, ...], Example]()
    for example in train:
        if (texts := _texts(example)) not in seen:
            kept.setdefault(texts, example)
    if not kept:
        raise InputError(
            f"benchmarks.{benchmark.name}.train: each of its {len(train)} rows is also in the evaluation split; "
            "allowed: a train split with rows of its own"
        )
    return list(kept.values())


def _texts(example: Example) -> tuple[Any, ...]:
    return (*example.fields.values(), *sorted(example.choices))


def _example(benchmark: BenchmarkConfig, where: str, index: int, row: dict[str, Any]) -> Example:
    """A row of a table as an example."""
    least = 1 if is_written(benchmark) else 2
    try:
        fields, choices, right = custom_parts(benchmark, row)
        for i, choice in enumerate(choices):
            if not isinstance(choice, str) or not choice.strip():
                raise ValueError(f"choice {i}: got {choice!r:.80}; allowed: a text")
        if len(choices) < least:
            raise ValueError(f"choices: got {len(choices)}; allowed: at least {least}")
        if not 0 <= right < len(choices):
            column, last = str(benchmark.answer), len(choices) - 1
            raise ValueError(
                f"column {column}: got {row[column]!r:.80}, which is none of the {len(choices)} choices; "
                f"allowed: an index from 0 to {last}, a letter from A to {chr(ord('A') + last)}, or a choice's text"
            )
    except ValueError as error:
        raise InputError(f"{where} {index}: {error}") from None
    return Example(index, fields, choices, right)


def load_benchmark(*, settings: BenchmarkSource, work: Work) -> dict[str, Any]:
    """Stage: write all splits as `examples.parquet`; a custom benchmark may lack a train split.

    Returns the number of examples per split, and of rows left out by `load_examples` or as repeated ones of a file.
    """
    benchmark = settings.benchmark
    rows = {part: _read(benchmark, part, work.downloads) for part in parts_of(benchmark)}
    evaluation = rows["evaluation"]
    splits = {part: _unseen(benchmark, own, evaluation) if own is not evaluation else own for part, own in rows.items()}
    every = [e for examples in splits.values() for e in examples]
    columns = {
        "split": [split for split, examples in splits.items() for _ in examples],
        "example": [e.index for e in every],
        "fields": [list(e.fields.items()) for e in every],
        "choices": [e.choices for e in every],
        "answer": [e.answer for e in every],
    }
    write_table(work.out / "examples.parquet", columns, EXAMPLES_SCHEMA)
    left_out = sum(map(len, rows.values())) - len(every)
    if benchmark.data:
        left_out = len(find_split(benchmark, "train").rows()) - len([e for e in every if e.answer != UNLABELLED])
    return {split: len(examples) for split, examples in splits.items()} | {"left_out": left_out}


def read_examples(folder: Path, split: Split) -> list[Example]:
    """The examples of one split, as `load_benchmark` wrote them; empty if the benchmark has no such split."""
    table = read_table(folder / "examples.parquet", EXAMPLES_SCHEMA)
    rows = table.filter(pc.equal(table["split"], split)).to_pylist()
    return [Example(r["example"], dict(r["fields"]), tuple(r["choices"]), r["answer"]) for r in rows]


def join_splits(folder: Path) -> dict[int, str]:
    """Let all examples be of the evaluation split, in the folder that `load_benchmark` wrote.

    Returns their messages, as JSON by example, which leave the folder: a layout words the other fields alone.
    """
    columns = read_table(folder / "examples.parquet", EXAMPLES_SCHEMA).to_pydict()
    fields = [*map(dict, columns["fields"])]
    messages = {i: own.pop("messages", "[]") for i, own in zip(columns["example"], fields, strict=True)}
    columns |= {"split": ["evaluation"] * len(fields), "fields": fields}
    write_table(folder / "examples.parquet", columns, EXAMPLES_SCHEMA)
    return messages
