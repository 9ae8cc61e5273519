"""Parquet tables with declared schemas, checked on writing and on reading."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from tailored_llama.files import read_table as read_table

Row = TypeVar("Row")


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
    if set(columns) != set(schema.names):
        raise ValueError(f"{path.name}: columns {sorted(columns)}, declared {sorted(schema.names)}")
    pq.write_table(pa.table({name: columns[name] for name in schema.names}, schema=schema), path)
