"""What a benchmark of the configuration must name, checked before any data is read."""

from __future__ import annotations

import difflib

from tailored_llama.config import WRITTEN, BenchmarkConfig, is_harness_task, is_written, task_fields
from tailored_llama.data.builtin import BUILTIN
from tailored_llama.data.custom import custom_columns
from tailored_llama.data.harness import harness_task
from tailored_llama.errors import InputError


def check_benchmark(benchmark: BenchmarkConfig) -> None:
    """Check, without reading data, that a benchmark is one of the seven, a task of the harness, or names its columns.

    Raises:
        InputError: an unknown name without columns, or settings that contradict each other.
    """
    name, where = benchmark.name, f"benchmarks.{benchmark.name}"
    if benchmark.ignore is not None and benchmark.metric != "exact_match":
        raise InputError(f"{where}.ignore: got {benchmark.ignore!r}; allowed: only with metric exact_match")
    if is_harness_task(name):
        for key in ("data", "subset", "train", "evaluation", "context", "choices", "answer"):
            if (value := getattr(benchmark, key)) is not None:
                raise InputError(f"{where}.{key}: got {value!r}; allowed: only in the task's own file")
        task_fields(harness_task(benchmark), benchmark.metric)
        return
    needed = ("context", "answer") if is_written(benchmark) else ("context", "choices", "answer")
    columns = {key: getattr(benchmark, key) for key in ("context", "choices", "answer")}
    if benchmark.source is None and (hub_only := [k for k in ("subset", "revision") if getattr(benchmark, k)]):
        raise InputError(f"{where}.{hub_only[0]}: set without source; allowed: only with a Hub data set")
    if name in BUILTIN:
        if benchmark.data:
            raise InputError(
                f"{where}.data: got {benchmark.data!r}; allowed: with another name than {name}, which is built in"
            )
        if named := [key for key, value in columns.items() if value is not None]:
            raise InputError(f"{where}.{named[0]}: got {columns[named[0]]!r}; allowed: only for a custom benchmark")
        if is_written(benchmark):
            raise InputError(f"{where}.metric: got {benchmark.metric!r}; allowed: acc or acc_norm, as it has choices")
    if is_written(benchmark) and benchmark.choices is not None:
        raise InputError(f"{where}.choices: got {benchmark.choices!r}; allowed: only with metric acc or acc_norm")
    if not is_written(benchmark):
        for key in ("max_new_tokens", "stop"):
            if (value := getattr(benchmark, key)) is not None:
                raise InputError(f"{where}.{key}: got {value!r}; allowed: only with metric {' or '.join(WRITTEN)}")
    if name in BUILTIN:
        return
    missing = [key for key in needed if not columns[key]]
    if benchmark.data and missing:  # its columns are looked for when the configuration is loaded
        raise InputError(
            f"{where}.data: got {benchmark.data!r}, no such file; allowed: a .csv, .jsonl or .parquet file"
        )
    if benchmark.source is None and benchmark.evaluation is None and benchmark.data is None:
        missing.append("evaluation")
    if missing:
        near = difflib.get_close_matches(name.lower(), list(BUILTIN), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"benchmarks: got {name!r}, unknown; {hint}allowed: {', '.join(BUILTIN)}, a .csv, .jsonl or .parquet "
            f"file, or a new name with train, evaluation, {', '.join(needed[:-1])} and answer "
            f"(not set: {', '.join(missing)})"
        )
    try:
        custom_columns(benchmark)
    except ValueError as error:
        raise InputError(f"{where}.context: got {benchmark.context!r}, {error}; allowed: {{column}}") from None
