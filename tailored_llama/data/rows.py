"""The rows of a user's own file: Parquet, JSONL or CSV."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tailored_llama.errors import InputError


def read_file(path: Path) -> list[dict[str, Any]]:
    """The rows of a local .parquet, .jsonl or .csv file.

    Raises:
        InputError: the file is missing, of another type, broken or empty.
    """
    import pandas as pd

    from tailored_llama.store import read_table

    if not path.is_file():
        raise InputError(f"{path}: no such file; allowed: a .parquet, .jsonl or .csv file")
    try:
        if path.suffix == ".parquet":
            rows = read_table(path).to_pylist()
        elif path.suffix in (".jsonl", ".json"):
            rows = _json_rows(path)
        elif path.suffix == ".csv":
            rows = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
        else:
            raise InputError(f"{path}: type {path.suffix or 'none'}; allowed: .parquet, .jsonl or .csv")
    except InputError:
        raise
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{path}: cannot be read ({reason})") from None
    if not rows:
        raise InputError(f"{path}: holds no rows; allowed: at least one")
    return [{str(k): v for k, v in row.items()} for row in rows]


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """One object per line, with its values unchanged (pandas would turn some into dates); missing keys are None."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                rows.append({**json.loads(line)})
            except (ValueError, TypeError):
                raise InputError(f"{path} line {number}: got {line[:80]!r}; allowed: one JSON object a line") from None
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]
