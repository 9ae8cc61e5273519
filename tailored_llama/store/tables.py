"""Parquet tables with declared schemas, checked on writing and on reading."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from tailored_llama.errors import InputError

Row = TypeVar("Row")

_VALUES_PER_BYTE = 100  # upper bound for tables whose rows differ; only constant columns pack tighter


def schema_of(row: type[Any]) -> pa.Schema:
    """The table schema of a dataclass whose fields are str, int, float or bool, or optional ones."""
    types: dict[Any, pa.DataType] = {float: pa.float64(), int: pa.int64(), str: pa.string(), bool: pa.bool_()}
    return pa.schema([(field.name, types[next(iter(get_args(field.type)), field.type)]) for field in fields(row)])


def write_rows(path: Path, rows: Sequence[Row], kind: type[Row]) -> None:
    """Write dataclass rows as a Parquet file with the schema of their class."""
    schema = schema_of(kind)
    write_table(path, {name: [getattr(row, name) for row in rows] for name in schema.names}, schema)


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """The rows that `write_rows` wrote. Errors as `read_table`."""
    return [kind(**row) for row in read_table(path, schema_of(kind)).to_pylist()]


def write_table(path: Path, columns: Mapping[str, Any], schema: pa.Schema) -> None:
    """Write a Parquet file whose columns are exactly the declared schema's."""
    pq.write_table(_table(path, columns, schema), path)


@contextmanager
def table_parts(path: Path, schema: pa.Schema) -> Iterator[Callable[[Mapping[str, Any], int], None]]:
    """Write a table larger than memory by a function that appends columns, in row groups of so many rows at most."""
    with pq.ParquetWriter(path, schema) as writer:
        yield lambda columns, rows: writer.write_table(_table(path, columns, schema), row_group_size=rows)


def _table(path: Path, columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    if set(columns) != set(schema.names):
        raise ValueError(f"{path.name}: columns {sorted(columns)}, declared {sorted(schema.names)}")
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def read_table(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """Read a Parquet file, and check it against the declared schema if one is given.

    An `InputError` says that it is missing, broken, of another schema, or claims more values than it can hold.
    """
    with _readable(path), pq.ParquetFile(path) as file:
        _check(file, path, schema)
        return _whole(file.read(), file.metadata.num_rows)


def open_table(path: Path, schema: pa.Schema) -> pq.ParquetFile:
    """Open a Parquet file, to read one row group after another. Errors as `read_table`."""
    with _readable(path):
        file = pq.ParquetFile(path)
        _check(file, path, schema)
        return file


def read_row_group(file: pq.ParquetFile, number: int, path: Path) -> pa.Table:
    """Read a row group of an open Parquet file. Errors as `read_table`."""
    with _readable(path):
        return _whole(file.read_row_group(number), file.metadata.row_group(number).num_rows)


def _whole(table: pa.Table, claimed: int) -> pa.Table:
    if table.num_rows != claimed:
        raise OSError(f"{table.num_rows} rows, but it claims {claimed}")
    return table


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0][:120]})") from None


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
