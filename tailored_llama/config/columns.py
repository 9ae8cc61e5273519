"""A benchmark in one file of the user's own: its name, and its columns where they have common names."""

import csv
import json
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tailored_llama.errors import InputError

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
OTHER_SOURCES = ("train", "evaluation", "source", "subset", "revision")  # fields that `data` replaces
COMMON = {  # field → the names of columns that may hold it, and what to say if there is none
    "context": (("question", "context", "prompt", "text"), "no column is called question, context, prompt or text"),
    "choices": (("choices",), "no column is called choices, and none a, b and so on"),
    "answer": (("answer", "label"), "no column is called answer or label"),
}


def as_benchmark(value: Any) -> Any:
    """A benchmark's table; a text is the name of a benchmark, or the path of a file that holds one."""
    if not isinstance(value, str):
        return value
    return {"data" if Path(value).suffix in SUFFIXES else "name": value}


def with_columns(table: Mapping[str, Any], written: bool) -> dict[str, Any]:
    """A benchmark's table with `data`, completed: the name from the file's, the columns by common names.

    Capitals do not matter. A column question is written as "Question: …" and "Answer:". Written answers have no
    choices. A file that is not there is left for later, so that a configuration loads without it. InputError: `data`
    stands beside another source, is no table, or has no column or several for a field.
    """
    file = table["data"]
    path = Path(file).expanduser()
    name = table.get("name") or re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).lstrip("-._")
    where = f"benchmarks.{name}.data: got {file!r}"
    if others := [key for key in OTHER_SOURCES if table.get(key) is not None]:
        raise InputError(f"{where} with {others[0]} = {table[others[0]]!r}; allowed: data alone, or {others[0]}")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{where}; allowed: a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    missing = [key for key in COMMON if table.get(key) is None and not (written and key == "choices")]
    if not missing or not path.is_file():
        return {**table, "name": name}
    try:
        columns = _columns(path)
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{where}, which cannot be read ({str(error)[:120]}); allowed: a table") from None
    if not columns:
        raise InputError(f"{where}, which holds no columns; allowed: a table")
    found = {key: _candidates(key, columns) for key in missing}
    if problems := {key: _unclear(key, several) for key, several in found.items() if len(several) != 1}:
        choice = "; or, where the model writes the answer, metric exact_match or f1" if "choices" in problems else ""
        allowed = f"columns of the file ({', '.join(columns)}){choice}"
        raise InputError(f"benchmarks.{name}: {'; '.join(problems.values())}; allowed: {allowed}")
    fields = {key: column for key, (column,) in found.items()}
    if str(fields.get("context")).lower() == "question":
        fields["context"] = f"Question: {{{fields['context']}}}\nAnswer:"
    return {**table, "name": name, **fields}


def _columns(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return list(pq.read_schema(path).names)
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            return next(filter(None, csv.reader(file)), [])
        return list(dict.fromkeys(str(key) for line in file if line.strip() for key in {**json.loads(line)}))


def _candidates(key: str, columns: Sequence[str]) -> list[str | tuple[str, ...]]:
    """Return the columns that may be meant; for the choices all columns a, b, c and so on together."""
    found: list[str | tuple[str, ...]] = [column for column in columns if column.lower() in COMMON[key][0]]
    letters = sorted((c for c in columns if len(c) == 1 and c in string.ascii_letters), key=str.lower)
    if key == "choices" and len(letters) > 1 and string.ascii_lowercase.startswith("".join(letters).lower()):
        found.append(tuple(letters))
    return found


def _unclear(key: str, several: Sequence[str | tuple[str, ...]]) -> str:
    """Say what the names of the columns leave open about a field."""
    shown = " and ".join(columns if isinstance(columns, str) else f"({', '.join(columns)})" for columns in several)
    return f"{key} is not set, and {f'{shown} may be meant' if shown else COMMON[key][1]}"
