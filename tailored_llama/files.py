"""Files: Parquet, checked before it is read, and the user's own CSV, JSON and Parquet; and how one is written whole."""

import csv
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tailored_llama.errors import InputError, one_line

ROW_FILES = "a .csv, .jsonl, .json or .parquet file"
CSV_CELLS = "a header, and as many cells in every row, in quotes if they have separators or line breaks"
_QUOTED_IN_PART = re.compile(r'(?:^|\t)"(?:[^\t]*[^"\t])?(?:\t|$)')  # a cell that a quote opens and does not end
_VALUES_PER_BYTE = 100  # upper bound for tables whose rows differ; only constant columns pack tighter


def read_table(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """Read a Parquet file, and check it against the declared schema if one is given.

    An `InputError` says that it is missing, broken, of another schema, or claims more values than it can hold.
    """
    try:
        with pq.ParquetFile(path) as file:
            _check(file, path, schema)
            table = file.read()
            if table.num_rows != file.metadata.num_rows:
                raise OSError(f"{table.num_rows} rows, but it claims {file.metadata.num_rows}")
            return table
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: not a readable Parquet file ({one_line(error)})") from None


def _check(file: pq.ParquetFile, path: Path, schema: pa.Schema | None) -> None:
    """Refuse another schema, and more values than the file can hold: pyarrow allocates memory for all at once."""
    actual = file.schema_arrow
    if schema and not actual.remove_metadata().equals(schema.remove_metadata()):
        wrong = [f.name for f in schema if f.name not in actual.names or not actual.field(f.name).equals(f)]
        raise InputError(f"{path}: column {(wrong or actual.names)[0]} is not as declared ({schema.names})")
    metadata = file.metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [[group.column(number).num_values for group in groups] for number in range(metadata.num_columns)]
    claimed, size = max([metadata.num_rows, *map(sum, columns)]), path.stat().st_size
    if not 0 <= claimed <= size * _VALUES_PER_BYTE:
        raise InputError(
            f"{path}: a column claims {claimed:,} values in {size:,} bytes; allowed: at most {_VALUES_PER_BYTE} a byte"
        )


def read_file(path: Path, may_be_empty: bool = False) -> list[dict[str, Any]]:
    """The rows of a file (`ROW_FILES`); InputError: it is missing, of another type, broken or empty."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; allowed: {ROW_FILES}")
    try:
        if (kind := path.suffix.lower()) == ".parquet":
            rows = read_table(path).to_pylist()
        elif kind in (".jsonl", ".json"):
            rows = _json_rows(path)
        elif kind in (".csv", ".tsv"):
            rows = _csv_rows(path)
        else:
            raise InputError(f"{path}: type {path.suffix or 'none'}; allowed: {ROW_FILES}")
    except InputError:
        raise
    except (ValueError, OSError, RecursionError) as error:  # pandas' parser errors are ValueErrors
        allowed = "a whole file in UTF-8"
        if kind in (".csv", ".tsv"):
            is_text = not isinstance(error, UnicodeDecodeError)
            allowed = CSV_CELLS if is_text else f"{allowed}, which spreadsheets save as CSV UTF-8"
        raise InputError(f"{path}: cannot be read ({one_line(error)}); allowed: {allowed}") from None
    if not rows and not may_be_empty:
        raise InputError(f"{path}: holds no rows; allowed: at least one")
    return [{str(k).strip(): v for k, v in row.items()} for row in rows]


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    """Rows whose cells are separated as in the header: by commas, semicolons or tabs; no empty rows at the end.

    Where every line has the header's tabs, a quote that opens a cell and does not end it is text, as in many TSV files.
    """
    import pandas as pd

    with path.open(encoding="utf-8-sig") as file:
        lines = [line.rstrip("\n") for line in file if line.strip()]
    header = lines[0] if lines else ""
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    tabs = {line.count("\t") for line in lines}
    is_plain = separator == "\t" and len(tabs) == 1 and 0 not in tabs and any(map(_QUOTED_IN_PART.search, lines))
    table = pd.read_csv(
        path,
        sep=separator,
        dtype=str,
        keep_default_na=False,
        skipinitialspace=f"{separator} " in header,
        quoting=csv.QUOTE_NONE if is_plain else csv.QUOTE_MINIMAL,
    )
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes the first cells of longer rows for their names
        got = f"rows of {len(table.columns) + table.index.nlevels} cells below a header of {len(table.columns)}"
        raise InputError(f"{path}: got {got}; allowed: {CSV_CELLS}")
    filled = (table != "").any(axis=1)
    rows: list[Any] = table[filled[::-1].cummax()[::-1]].to_dict("records")
    return rows


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """One object per line, or one list of objects, perhaps as `data` of one; missing keys are None."""
    text, allowed = path.read_text(encoding="utf-8-sig"), "one JSON object a line, or one list of them"
    try:
        whole = _from_json(text)
    except ValueError as error:
        if text.lstrip().startswith("["):
            raise InputError(f"{path}: got a list that is no JSON ({error}); allowed: {allowed}") from None
        whole = None
    listed = whole.get("data") if isinstance(whole, dict) else None
    if isinstance(listed, list) and listed and all(isinstance(row, dict) for row in listed):
        whole = listed
    rows = list[dict[str, Any]]()
    is_list = isinstance(whole, list)
    for number, part in enumerate(whole if is_list else text.split("\n"), start=int(not is_list)):
        if is_list or part.strip():
            try:
                rows.append({**(part if is_list else _from_json(part))})
            except (ValueError, TypeError):
                at = f"row {number}" if is_list else f"line {number}"
                raise InputError(
                    f"{path} {at}: got {(json.dumps(part) if is_list else part)[:80]!r}; allowed: {allowed}"
                ) from None
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _from_json(text: str) -> Any:
    """A value as JSON has it; half of an emoji, as in a text that was cut, becomes a question mark."""
    value = json.loads(text)
    if "\\ud" in text.lower():
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A path beside that of a file, whose place it takes once the block has ended without an error."""
    part = out.with_name(f"{out.name}.part")
    try:
        yield part
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
