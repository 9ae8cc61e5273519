"""Sections on what goes in: the model, texts, benchmarks and prompts."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tailored_llama.config.forms import METRICS, SUFFIXES, WRITTEN, Form, Kind, Metric, as_benchmark, is_row_file
from tailored_llama.config.section import Section

Dtype = Literal["float32", "bfloat16", "float16"]
PROMPTS = "prompts"  # calibration source: the training prompts of the run's own benchmarks
OWN = "own"  # unlabelled rows: those of the benchmark's own file alone
QUESTIONS = "questions"  # calibration source: the questions of their train splits, without answers
Ignored = Literal["case", "punctuation", "numbers", "spaces"]


class ModelConfig(Section):
    """The dense model that everything starts from."""

    source: str = Field("smollm2-135m-instruct", min_length=1)
    """An embedded model (smollm2-135m-instruct or gemma-3-270m, from pinned PyPI wheels), a local folder, a .gguf file,
    or a Hub id such as meta-llama/Llama-2-7b-hf."""
    revision: str | None = Field(None, description="Hub models only: commit, tag or branch (resolved to its commit).")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Type of the weights, from loading to merging. auto: bfloat16 where this machine computes in it natively, about
    twice as fast; otherwise float32."""

    @property
    def short_name(self) -> str:
        """The model's name in run names: the last part of the source."""
        return Path(self.source).name or self.source


class TextConfig(Section):
    """A text to read, for calibration or perplexity."""

    source: str = Field("boolq", min_length=1)
    """A benchmark's name (its texts, see column), a .txt, .csv, .jsonl, .json or .parquet file, or the id of a Hub data
    set."""
    subset: str | None = Field(None, description="Hub data sets only: the configuration, e.g. wikitext-2-raw-v1.")
    revision: str | None = Field(None, description="Hub data sets only: commit, tag or branch.")
    split: str = Field("train", description="Benchmarks and Hub data sets: the split to read.")
    column: str = Field("text", description="The column (or benchmark field) that holds the text.")
    documents: int = Field(10_000, ge=1, description="Hub data sets only: rows read, from the start of the split.")


def part_of(total: int, i: int, parts: int) -> int:
    """Size of part i when `total` items are divided into `parts`."""
    return total // parts + (i < total % parts)


class CalibrationConfig(TextConfig):
    """The calibration text of importance and reconstruction (LLM-Pruner: 10 samples of 64 tokens)."""

    source: str = Field(QUESTIONS, min_length=1)
    """questions: those of the train splits of the run's own benchmarks, without answers (BoolQ's passages where no
    benchmark has a train split). prompts: their training prompts, with answers. Or another text: a benchmark's name
    (its texts, see column), a .txt, .csv, .jsonl, .json or .parquet file, or a Hub data set such as
    Salesforce/wikitext."""
    column: str = Field("passage", description="The column (or benchmark field) that holds the text.")
    samples: int = Field(16, ge=1, le=65536, description="Sequences drawn from the text.")
    tokens: int = Field(512, ge=8, le=32768)
    """Tokens in each sequence. A few long ones work better than many short ones."""


class BenchmarkConfig(Section):
    """A benchmark: one of the seven, or one of the user's own."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,95}$")
    """boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa or csqa; or a new name, with `data`, or
    `train` and `evaluation`, or `source`, and the columns. Absent with `data`: the file's name."""
    source: str | None = Field(None, description="Own benchmarks: a Hub data set.")
    data: str | None = None
    """Own benchmarks: one .csv, .jsonl, .json or .parquet file, in place of `train` and `evaluation`. The hash of each
    row decides whether it is to tune on (45 %), to choose with (15 %) or to report on (40 %). Columns with common names
    need not be set: messages; instruction, input and output; prompt and completion; text and label; passage, question
    and answer; question, choices (or a, b, …) and answer; and others like them."""
    unlabelled: str | None = None
    """With `data`, in a search: a file of rows whose answers nobody knows yet. Three quarters of them are to prove on,
    the others to choose with. Answers are asked for only where models differ. `data` is then to tune on (75 %) and to
    choose with (25 %). Its rows without an answer count as such rows, too; own: these alone."""
    form: Form | None = None
    """With `data`: what a row stands for. messages: its messages and tools, read as the columns system, user (the tools
    first), assistant, and prompt (system and user together); or a prompt and a completion that are messages. alpaca:
    its instruction and input, read as the column prompt. Absent: found by the columns."""
    kind: Kind | None = None
    """With `data`: what the answers are. labels: one set for all rows; choices: those of each row; written: text that
    the model writes; json: objects, or lists of them; call: calls of tools. Absent: choices if there are columns with
    choices; json or call if the answers are such; else few answers that come again and again are labels, others are
    written. On the command line: --set rows.kind=written, and so for the other fields."""
    subset: str | None = Field(None, description="Hub data sets only: the configuration.")
    revision: str | None = Field(None, description="Hub data sets only: commit, tag or branch.")
    train: str | None = Field(
        None, description="Train split: a .csv, .jsonl, .json or .parquet file, or a Hub split's name."
    )
    evaluation: str | None = Field(None, description="Evaluation split: a file, or a Hub split's name.")
    is_divided: bool = False
    """Without `data`: a quarter of the train split, by the hash of each row, is to choose with, and is read for nothing
    else. A search sets it."""
    context: str | None = None
    """Own benchmarks: the column with the text before the answer, or a format string of columns, such as
    "{passage}\\nQuestion: {question}\\nAnswer:"."""
    choices: str | tuple[str, ...] | None = None
    """Own benchmarks: the column with the list of choices, or one column per choice."""
    labels: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(None, min_length=2)
    """Own benchmarks: the choices of all rows, in place of `choices`. Absent with `data`: the answers, sorted."""
    answer: str | None = None
    """Own benchmarks: the column with the answer: its index from 0, a letter (A, B, …), or its text. Written answers:
    an accepted text, or a list of them. JSON and calls: one, or a list of texts in JSON, each of them accepted."""
    instruction: str | None = Field(None, description="Own benchmarks: the sentence that states the task.")
    metric: Metric | None = None
    """Headline metric; absent: the benchmark's own; for new ones acc with labels, exact_match with kind written, json
    with kind json, tool_call with kind call, else acc_norm. exact_match and f1 (SQuAD's), json and tool_call are for
    benchmarks without choices, where the model writes the answer."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Written answers: maximum tokens; absent: 32, or with `data` as many as the longest answer needs, if more."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    """Strings that end a written answer, beside the end of text that is tuned; absent: the end of the line, or with
    `data` one line break more than any answer has in a row, and for json and call none."""
    ignore: tuple[Ignored, ...] | None = None
    """Written answers: what exact_match ignores, of case, punctuation, numbers and spaces around the answer; absent:
    case, punctuation, articles and repeated spaces (SQuAD's)."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        """Name a benchmark by its file; answers in JSON have no end but that of the text."""
        data = as_benchmark(data)
        if not isinstance(data, dict):
            return data
        if isinstance(file := data.get("data"), str):
            if data.get("unlabelled") == file:
                data = data | {"unlabelled": OWN}
            name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(file).stem).lstrip("-._")[:96]
            return {**data, "name": data.get("name") or name or "rows"}
        is_text = WRITTEN.get(str(data.get("metric")), "written") == "written"
        return data if is_text or data.get("stop") is not None else {**data, "stop": ()}

    def contradictions(self) -> Iterator[str]:
        for field, file in (("data", self.data), ("unlabelled", self.unlabelled)):
            if file not in (None, OWN) and not is_row_file(str(file)):
                allowed = f"a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file"
                yield f"benchmarks.{self.name}.{field}: got {file!r}; allowed: {allowed}"
        where = f"benchmarks.{self.name}.metric: got {self.metric!r}"
        if self.unlabelled is not None and self.metric == "f1":
            yield f"{where} with unlabelled rows; allowed: a metric that is right or wrong"
        if self.kind and self.metric and self.metric not in METRICS[self.kind]:
            yield f"{where} with kind = {self.kind!r}; allowed: {' or '.join(METRICS[self.kind])}"


class PromptConfig(Section):
    """How examples are written as prompts, for both tuning and scoring."""

    template: str = Field("harness", min_length=1)
    """A template set: harness (lm-evaluation-harness's own formatting), generic (one wording for every benchmark),
    task, task-2, task-3 (an instruction for each benchmark, in three wordings), reread (task with the question read
    twice: RE2, arXiv 2309.06275), lettered (choices listed, their letters scored), or your own .toml file,
    like those in data/prompts."""
