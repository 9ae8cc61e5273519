"""Plain text for calibration and perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tailored_llama import benchmarks, sources
from tailored_llama.config import BenchmarkConfig, TextConfig
from tailored_llama.errors import InputError
from tailored_llama.files import sha256_file

PROMPTS = "prompts"  # as a source of calibration text: the training prompts of the run's own benchmarks


def text_identity(text: TextConfig) -> dict[str, Any]:
    """Which text is read, free of paths and times: the part of a cache key.

    Raises:
        InputError: the source is no benchmark, file or Hub data set.
    """
    if text.source == PROMPTS:
        return {"source": PROMPTS}  # which ones: the prompts' artifacts say
    if text.source in benchmarks.SEVEN:
        benchmark = BenchmarkConfig(name=text.source)
        return benchmarks.identity(benchmark, _side(text)) | {"column": text.column}
    path = Path(text.source).expanduser()
    if path.is_file():
        return {"sha256": sha256_file(path), "column": None if path.suffix == ".txt" else text.column}
    if sources.is_hub_id(text.source) and not path.suffix:
        commit = sources.hub_commit(text.source, text.revision, "dataset")
        where = {"hub": text.source, "subset": text.subset, "commit": commit}
        return where | {"split": text.split, "column": text.column, "documents": text.documents}
    raise InputError(
        f"source {text.source} (a text): no such file; allowed: {', '.join(benchmarks.SEVEN)}, a .txt, .parquet, "
        ".jsonl or .csv file, or a Hub data set (owner/name)"
    )


def text_name(text: TextConfig) -> str:
    """What an artifact calls a text: never a path, which its key does not know."""
    path = Path(text.source).expanduser()
    is_file = text.source not in benchmarks.SEVEN and path.is_file()
    return f"sha256:{sha256_file(path)}" if is_file else text.source


def load_texts(text: TextConfig, downloads: str) -> list[str]:
    """The documents of a text, empty ones left out; a .txt file is one document.

    Raises:
        InputError: the source cannot be read, the column is missing, or nothing is left.
    """
    path = Path(text.source).expanduser()
    if text.source in benchmarks.SEVEN:
        benchmark = BenchmarkConfig(name=text.source)
        found = benchmarks.benchmark_texts(benchmark, _side(text), text.column, downloads)
    elif path.is_file() and path.suffix == ".txt":
        try:
            found = [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    else:
        found = _column(_rows(text, path), text)
    if not (found := [document for document in found if document.strip()]):
        raise InputError(f"source {text.source} (a text): holds no text; allowed: at least one document")
    return found


def _side(text: TextConfig) -> Any:
    return "train" if text.split == "train" else "evaluation"


def _rows(text: TextConfig, path: Path) -> list[dict[str, Any]]:
    if path.is_file():
        return sources.read_rows(path)
    commit = sources.hub_commit(text.source, text.revision, "dataset")
    rows = sources.hub_column(text.source, text.subset, commit, text.split, text.column, text.documents)
    if not rows:
        raise InputError(f"{text.source}: split {text.split!r} holds no rows; allowed: at least one")
    return rows


def _column(rows: list[dict[str, Any]], text: TextConfig) -> list[str]:
    if text.column not in rows[0]:
        raise InputError(f"{text.source}: no column {text.column!r}; allowed: {', '.join(map(str, rows[0]))}")
    return [value for row in rows if isinstance(value := row.get(text.column), str)]
