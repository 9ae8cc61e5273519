"""Plain text for calibration and perplexity."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow.parquet as pq

from tailored_llama.config import PROMPTS, QUESTIONS, BenchmarkConfig, RunConfig, TextConfig, narrow, part_of
from tailored_llama.data.benchmarks import benchmark_texts, check_text_of, has_train, load_questions
from tailored_llama.data.builtin import BUILTIN
from tailored_llama.data.splits import BenchmarkSource, Split, check_column
from tailored_llama.errors import InputError
from tailored_llama.files import ROW_FILES, read_file
from tailored_llama.store import hub_commit, hub_rows, is_hub_id, sha256_file

GENERAL_WORDS = "general_words.parquet"
_FILES = (".txt", ".parquet", ".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class TextSource:
    """The origin of a text. Only this class distinguishes the kinds of source."""

    kind: Literal["prompts", "questions", "benchmark", "file", "hub"]
    text: TextConfig
    benchmark: BenchmarkConfig | None = None  # whose texts are read (kind benchmark), or questions (kind questions)

    @property
    def path(self) -> Path:
        """The local file."""
        return Path(self.text.source).expanduser()

    @property
    def name(self) -> str:
        """The name of the text in artifacts: never a path, since keys do not depend on paths."""
        if self.benchmark and self.kind == "questions":
            return f"{self.text.source} of {self.benchmark.name}"
        return f"sha256:{sha256_file(self.path)}" if self.kind == "file" else self.text.source

    def identity(self) -> dict[str, Any]:
        """Identify the text without paths or times; InputError: the Hub cannot resolve a branch or tag."""
        text, benchmark = self.text, self.benchmark
        if benchmark and self.kind == "questions":
            return {"source": self.kind, "asked": BenchmarkSource(benchmark).split_identity("train")}
        if benchmark:
            split: Split = "train" if text.split == "train" else "evaluation"
            return BenchmarkSource(benchmark).split_identity(split) | {"column": text.column}
        if self.kind == "file":
            return {"sha256": sha256_file(self.path), "column": None if self.path.suffix == ".txt" else text.column}
        if self.kind == "hub":
            fields = text.model_dump(include={"subset", "split", "column", "documents"})
            return fields | {"hub": text.source, "commit": hub_commit(text.source, text.revision, "dataset")}
        return {"source": self.kind}  # prompts are identified by their artifacts


def find_text(text: TextConfig, field: str = "text") -> TextSource:
    """Find the origin of a text, without reading it or using the network."""
    path = Path(text.source).expanduser()
    if text.source == PROMPTS:
        return TextSource("prompts", text)
    if text.source in BUILTIN:
        return TextSource("benchmark", text, BenchmarkConfig(name=text.source))
    if path.is_file():
        return TextSource("file", text)
    if is_hub_id(text.source) and path.suffix not in _FILES:
        return TextSource("hub", text)
    raise InputError(
        f"{field}.source: got {text.source!r}, no such file; allowed: {', '.join(BUILTIN)}, a .txt file, "
        f"{ROW_FILES}, or a Hub data set (owner/name)"
    )


@dataclass(frozen=True)
class DrawnText:
    """A text, and the number of sequences drawn from it."""

    source: TextSource
    samples: int


@dataclass(frozen=True)
class CalibrationSettings:
    """The texts of the calibration, the tokens of each sequence, and the seed of the draw."""

    texts: tuple[DrawnText, ...]
    tokens: int
    seed: int

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        return cls(calibration_texts(config), config.calibration.tokens, config.seed)


def calibration_texts(config: RunConfig) -> tuple[DrawnText, ...]:
    """The text of a run's calibration; or the questions of its benchmarks, which share the sequences.

    These are the benchmarks with a train split. If there are none, BoolQ's passages are the text.
    """
    text, samples = narrow(config.calibration, TextConfig), config.calibration.samples
    asked = [benchmark for benchmark in config.benchmarks if has_train(benchmark)]
    if text.source == QUESTIONS and asked:
        sources = [TextSource("questions", text, benchmark) for benchmark in asked]
        return tuple(DrawnText(source, part_of(samples, i, len(asked))) for i, source in enumerate(sources))
    if text.source == QUESTIONS:
        text = text.model_copy(update={"source": "boolq"})
    found = find_text(text, "calibration")
    own = [benchmark for benchmark in config.benchmarks if benchmark.name == text.source]
    return (DrawnText(replace(found, benchmark=own[0]) if found.benchmark and own else found, samples),)


def read_general_words() -> dict[str, int]:
    """The words of the train splits of the embedded benchmarks that occur three times or more, with their counts.

    A word has the space before it, if any. tests/performance/coverage.py writes the file. Another file needs
    a higher version of the stage `tokens`, whose key has no word of it.
    """
    table = pq.read_table(Path(__file__).parent / GENERAL_WORDS)
    return dict(zip(table["word"].to_pylist(), table["count"].to_pylist(), strict=True))


def check_text(text: TextConfig, field: str) -> None:
    """Check that a text's source exists and can be read and, if that needs no network, its column."""
    source = find_text(text, field)
    if source.kind == "prompts":
        raise InputError(f"{field}.source: got 'prompts'; allowed: a text of its own; prompts is for calibration")
    if source.benchmark:
        check_text_of(source.benchmark, text.split, text.column)
    elif source.kind == "file":
        load_texts(source, "")


def load_texts(source: TextSource, downloads: str) -> list[str]:
    """The documents of a text other than `prompts`, without empty ones; a .txt file is one document.

    InputError: the source cannot be read, the column is missing, or all documents are empty.
    """
    documents = [document for document in _documents(source, downloads) if document.strip()]
    if not documents:
        raise InputError(f"source {source.text.source} (a text): holds no text; allowed: at least one document")
    return documents


def _documents(source: TextSource, downloads: str) -> list[str]:
    text = source.text
    if source.benchmark and source.kind == "questions":
        return list(load_questions(source.benchmark, downloads).values())
    if source.benchmark:
        return benchmark_texts(source.benchmark, text.split, text.column, downloads)
    if source.kind == "file" and source.path.suffix == ".txt":
        return [_read_plain(source.path)]
    if source.kind == "file":
        rows = read_file(source.path)
    else:
        commit = hub_commit(text.source, text.revision, "dataset")
        rows = hub_rows(text.source, text.subset, commit, text.split, text.documents)
    if not rows:
        raise InputError(f"{text.source}: split {text.split!r} holds no rows; allowed: at least one")
    check_column(text.source, text.column, rows[0])
    return [value for row in rows if isinstance(value := row.get(text.column), str)]


def _read_plain(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def all_texts(path: Path) -> list[str]:
    """All that a .txt file or one with rows says: the text, or every text in every column, also in lists.

    Each text of a table is there twice, the second time after a space: an answer is written after its question.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; allowed: a .txt file, or {ROW_FILES}")
    texts = [_read_plain(path)] if path.suffix == ".txt" else list(_strings(read_file(path)))
    if not any(map(str.strip, texts)):
        raise InputError(f"{path}: holds no text; allowed: at least one")
    return texts if path.suffix == ".txt" else [*texts, *(f" {text}" for text in texts)]


def _strings(value: Any) -> Iterator[str]:
    """The strings in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
