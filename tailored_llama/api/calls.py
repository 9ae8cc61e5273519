"""The calls. Each composes the stages that a flow does: results are the same, and are found again in a store."""

import functools
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tailored_llama import evaluation, models, reports, training
from tailored_llama.api.models import Small, Smallest
from tailored_llama.config import RunConfig, SmallestConfig, assign, build_config
from tailored_llama.console import quietly
from tailored_llama.errors import InputError
from tailored_llama.pipeline import COMPOSITIONS, StoreExecutor, answer_folder, steps
from tailored_llama.store import state_folder

Settings = Mapping[str, Any]  # dotted field of a configuration → value, such as {"tuning.epochs": 5}
Rows = Any  # a list of dicts, a pandas.DataFrame, a datasets.Dataset, a file, or the name of a benchmark
Source = Any  # a path, a Hub id, an embedded name, or a model of transformers with its tokenizer

ARGUMENTS = {  # field of the configuration → the argument that sets it
    "model.source": "model",
    "pruning.ratios": "ratio",
    "calibration.source": "text",
    "goal.lose_at_most": "lose_at_most",
    "scoring.limit": "limit",
    "store.root": "store",
}


@contextmanager
def _call() -> Iterator[None]:
    """Keep libraries quiet, and let an error name the argument, not the field of a configuration that nobody wrote."""
    try:
        with quietly():
            yield
    except InputError as error:
        for field, argument in ARGUMENTS.items():
            if found := re.match(rf"{re.escape(field)}(\.0)?\b", str(error)):
                raise InputError(argument + str(error)[found.end() :]) from None
        raise


@_call()
def prune(
    model: Source,
    ratio: float,
    text: str | Sequence[str] | None = None,
    rows: Rows = None,
    store: str | Path | None = None,
    settings: Settings | None = None,
) -> Small:
    """Remove a share of all parameters.

    Args:
        model: a folder, a Hub id, an embedded name, or a model of transformers and its tokenizer, as a pair.
        ratio: of all parameters, embeddings included.
        text: what the model will read: texts, a file, or a data set; it decides what is important.
        rows: of the job, as in `tune`, in its place: their questions are the text.
        store: a folder for all artifacts, which are found there again; absent: a temporary one.
        settings: further fields of a configuration, such as {"pruning.kinds": ["mlp"]}.

    Raises:
        InputError: an argument is wrong; the message names it.
    """
    if (text is None) == (rows is None):
        raise InputError("text: got both or none of text and rows; allowed: one of them")
    fields: dict[str, Any] = {"pruning.ratios": [ratio]}
    if isinstance(text, str):
        fields["calibration.source"] = text
    elif text is not None:
        written = _written(({"text": one} for one in text), "text")
        fields |= {"calibration.source": written, "calibration.column": "text"}
    benchmark = None if rows is None else _benchmark(rows)
    run, config = _runner_and_config(model, benchmark, store, fields | dict(settings or {}))
    prompts = steps.render_all(config)
    pruned = steps.prune_to(config, steps.prepare_dense(config, prompts), ratio, prompts)
    run.open(pruned)
    return Small(run, config, pruned, removed=ratio)


@_call()
def tune(model: Small | Source, rows: Rows, store: str | Path | None = None, settings: Settings | None = None) -> Small:
    """Tune a model to a job on as many of its rows as `tuning.tokens` allows.

    A hash of each row decides what it is for: 45 % to tune on, 15 % to choose with, 40 % to compare on. So what
    `compare` and `smallest` score was never tuned on. An adapter that is no better than none on held-out rows is left
    out; `verdict` says so.

    Args:
        model: what `prune` has made, or a dense model.
        rows: a list of dicts, a data frame, a Dataset, a file, or the name of a benchmark. The columns may be text and
            label; prompt and completion; instruction, input and output; messages; or question, choices (or a, b, …)
            and answer.
        store: as in `prune`; of a model that was made here, its own.
        settings: further fields of a configuration, such as {"tuning.shots": 100}.

    Raises:
        InputError: an argument is wrong; the message names it.
    """
    small = _as_small(model, _benchmark(rows), store, settings or {})
    (name,) = (benchmark.name for benchmark in small.config.benchmarks)
    prompts = steps.render_all(small.config)
    adapter = steps.tune(small.config, [name], 0.0, small.checkpoint, prompts)
    comparison = training.read_comparison(small.run.open(adapter))
    ships = training.ships_adapter(small.config.tuning, comparison)
    verdict = reports.verdict_line(comparison) if comparison else ""
    return replace(small, adapter=adapter if ships else None, verdict=verdict)


@_call()
def compare(
    *compared: Small | Source, benchmark: Rows, limit: int | None = None, settings: Settings | None = None
) -> Any:
    """Score models on a benchmark, and compare each with the first.

    Args:
        compared: what `prune` or `tune` has made, or dense models.
        benchmark: its name, or rows as in `tune`, of which 40 % are scored.
        limit: evenly spaced examples of them; absent: all.
        settings: further fields of a configuration.

    Returns:
        A pandas.DataFrame with a row for each model: its parameters, the accuracy with its standard error, and the
        difference from the first model with its paired 95 % interval. All are shares.

    Raises:
        InputError: an argument is wrong; the message names it.
    """
    import pandas as pd

    fields = {**(settings or {}), **({} if limit is None else {"scoring.limit": limit})}
    parameters, folders = list[int](), dict[str, Path]()
    for position, one in enumerate(compared, 1):
        small = _as_small(one, _benchmark(benchmark), None, fields)
        (own,) = small.config.benchmarks
        prompts = steps.render(small.config, own.name, "evaluation", steps.load_examples(own))
        scored = steps.score(small.config, own.name, repr(small), small.checkpoint, prompts, small.adapter)
        parameters.append(small.parameters)
        folders[f"{small.name} ({position})" if small.name in folders else small.name] = small.run.open(scored)
    table = pd.DataFrame(evaluation.compare_scores(folders))
    table.insert(1, "parameters", parameters)
    return table


@_call()
def smallest(
    model: Source,
    rows: Rows,
    lose_at_most: float = 3.0,
    unlabelled: Rows = None,
    export: str | Path | None = None,
    store: str | Path | None = None,
    settings: Settings | None = None,
) -> Smallest:
    """Find the smallest model that still does a job, and prove that it does.

    Args:
        model: as in `prune`.
        rows: as in `tune`.
        lose_at_most: points of accuracy.
        unlabelled: rows without answers, in the forms of `tune`, to choose with and to prove on; labels are asked for
            where two models differ, in the file that the field goal.labels names.
        export: a folder that gets the model; absent: one that is gone when Python ends.
        store: as in `prune`. How often the rows were opened is recorded there, and in the user's state folder.
        settings: further fields of a configuration, such as {"goal.runtime": "transformers"}.

    Raises:
        InputError: an argument is wrong, or so many rows cannot prove it; the message says what could. Or without
            `store`, the user's state folder cannot be written.
        WaitingForLabels: rows have to be labelled first; the message says where they are.
    """
    if store is None:
        try:
            state_folder()
        except OSError as error:
            allowed = "a store, or a state folder that can be written (XDG_STATE_HOME)"
            raise InputError(
                f"store: got none, to record the opening of rows in, and {error}; allowed: {allowed}"
            ) from None
    fields = {"goal.lose_at_most": lose_at_most, "store.export": str(export or _new_folder())}
    if unlabelled is not None:
        others = _benchmark(unlabelled)
        fields["rows.unlabelled"] = others if isinstance(others, str) else others["data"]
    composition = COMPOSITIONS["smallest"]
    run, config = _runner_and_config(model, _benchmark(rows), store, fields | dict(settings or {}), SmallestConfig)
    composition.check(config)
    report = run.folder(composition.make(run, config))
    answer = evaluation.read_answer(report)
    return Smallest(answer, report, answer_folder(config) if answer.proven is not None else None)


@functools.cache
def _session() -> tempfile.TemporaryDirectory[str]:
    """A folder that is gone when Python ends."""
    return tempfile.TemporaryDirectory(prefix="tailored-llama-")


def _new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=_session().name))


def _runner_and_config(
    model: Source, benchmark: Any, store: str | Path | None, fields: Settings, kind: type[RunConfig] = RunConfig
) -> tuple[StoreExecutor, Any]:
    """An executor and the configuration of a call."""
    root = Path(_session().name) / "store" if store is None else store
    values = {"model": {"source": _source(model)}, "store": {"root": str(root), "reports": None}}
    config = _configured(values, benchmark, fields, kind)
    models.find_model(config.model)
    models.pick_device(config.execution.device)
    return StoreExecutor(config.store, config.execution), config


def _configured(values: dict[str, Any], benchmark: Any, fields: Settings, kind: type[RunConfig] = RunConfig) -> Any:
    """A configuration from plain data with further fields, and the benchmark; None: it has none."""
    for field, value in fields.items():
        assign(values, field, value)
    if benchmark is None:
        return build_config(kind, values).model_copy(update={"benchmarks": ()})
    return build_config(kind, values | {"benchmarks": [benchmark]})


def _as_small(model: Small | Source, benchmark: Any, store: str | Path | None, fields: Settings) -> Small:
    """A model that was made here, with the settings that made it, for another job; or a dense one."""
    if isinstance(model, Small):
        config = _configured(model.config.model_dump(mode="json"), benchmark, fields)
        run = StoreExecutor(config.store, config.execution)  # a new one: files may have changed
        return replace(model, config=config, run=run)
    run, config = _runner_and_config(model, benchmark, store, fields)
    return Small(run, config, steps.load_dense(config))


def _source(model: Source) -> str:
    """The source of a model; one in memory is written to a folder, named by its weights when it is loaded."""
    if isinstance(model, str | Path):
        return str(model)
    folder = str(_new_folder())
    try:
        own, tokenizer = model
        own.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (TypeError, ValueError, AttributeError):
        kind = type(model).__name__
        raise InputError(f"model: got {kind}; allowed: a path, a Hub id, or a model and its tokenizer") from None
    return folder


def _benchmark(rows: Rows) -> Any:
    """A benchmark's name, or a table of rows in a file; a Dataset's classes are written by their names."""
    if isinstance(rows, str | Path):
        return str(rows)
    if hasattr(rows, "with_format"):  # a Dataset, which may give tensors
        rows = rows.with_format(None)
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a data frame
        rows = rows.to_dict("records")
    features = getattr(rows, "features", None) or {}
    classes = {column: feature.names for column, feature in features.items() if hasattr(feature, "names")}
    try:
        return {"data": _written((_named(row, classes) for row in rows), "rows"), "name": "rows"}
    except (TypeError, ValueError):
        allowed = "a list of dicts, a data frame, a Dataset (no DatasetDict), a file, or the name of a benchmark"
        raise InputError(f"rows: got {type(rows).__name__}; allowed: {allowed}") from None


def _named(row: Mapping[str, Any], classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A row with the names of its classes in place of their numbers; -1 is a missing one."""
    names = {column: dict(enumerate(names)).get(row[column]) for column, names in classes.items()}
    return {**row, **names}


def _written(rows: Iterable[Mapping[str, Any]], name: str) -> str:
    """A JSONL file of rows."""
    file = _new_folder() / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row, default=_as_json) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def _as_json(value: Any) -> Any:
    """A value that JSON lacks: an array of numpy, in which pandas reads lists, as a list; another as its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
