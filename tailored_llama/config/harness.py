"""Tasks of lm-evaluation-harness 0.4.13 as benchmarks: what their files say, read without importing the harness.

A benchmark named `lm_eval:sciq` is the harness's task `sciq`. `tailored_llama/data/harness.py` loads its documents.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tailored_llama.errors import InputError

PREFIX = "lm_eval:"
FUNCTION = "!function "  # what a setting begins with that names a Python function
_TASK, _GROUP = (
    re.compile(rf"""^["']?{kind}["']?\s*:[ \t]*["']?([^\s"'#\[{{]+)""", re.MULTILINE) for kind in ("task", "group")
)
_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # aliases, the first one counts
_IGNORES = {"ignore_case": "case", "ignore_punctuation": "punctuation", "ignore_numbers": "numbers"}


@dataclass(frozen=True)
class HarnessTask:
    """One task; a setting that names a Python function is the text `!function FOLDER/MODULE.FUNCTION`."""

    name: str
    file: Path
    settings: Mapping[str, Any]

    def refuse(self, got: str, allowed: str) -> InputError:
        """The error for a task that cannot be a benchmark."""
        return InputError(f"benchmarks.{PREFIX}{self.name}: {got}; allowed: {allowed}")

    @property
    def has_choices(self) -> bool:
        """True if the task ranks choices; otherwise the model writes the answer."""
        return self.settings.get("output_type") == "multiple_choice"

    @property
    def has_train(self) -> bool:
        """True if the task has a train split."""
        return self.settings.get("training_split") is not None


def is_harness_task(name: object) -> bool:
    """Return whether a benchmark's name means a task of lm-evaluation-harness."""
    return isinstance(name, str) and name.startswith(PREFIX)


def find_task(benchmark: str, folder: str | None) -> HarnessTask:
    """Find the file of a task, such as lm_eval:sciq, and read it; the user's own task files in `folder` come first.

    InputError: the harness is not installed, there is no such folder or task, or its file cannot be read.
    """
    name = benchmark.removeprefix(PREFIX)
    harness = find_spec("lm_eval")
    if harness is None or not harness.submodule_search_locations:
        raise InputError(
            f"benchmarks: got {benchmark!r}, which needs lm-evaluation-harness; allowed: after pip install "
            "'tailored-llama[lm-eval]'"
        )
    tasks, groups = _shipped(Path(harness.submodule_search_locations[0]) / "tasks")
    if folder is not None:
        if not (own_folder := Path(folder).expanduser()).is_dir():
            where = f"benchmarks.{benchmark}.source"
            raise InputError(f"{where}: got {folder!r}, no such folder; allowed: a folder with task files (.yaml)")
        own_tasks, own_groups = _named(own_folder)
        tasks, groups = tasks | own_tasks, groups | own_groups
    if name in groups and name not in tasks:
        members = sorted(task for task in tasks if task.startswith(f"{name}_"))[:3]
        such = f", such as {', '.join(members)}" if members else ""
        raise InputError(f"benchmarks: got {benchmark!r}, a group of tasks; allowed: one task{such}")
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise InputError(
            f"benchmarks: got {benchmark!r}, unknown; {hint}allowed: a task that `lm-eval ls tasks` lists, or a task "
            "file in the folder `source`"
        )
    try:
        return HarnessTask(name, tasks[name].resolve(), _read(tasks[name]))
    except (OSError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"benchmarks.{benchmark}: {tasks[name].name}: {said}; allowed: a readable task file") from None


def task_fields(task: HarnessTask, metric: str | None = None) -> dict[str, Any]:
    """The fields of a benchmark that a task decides: its metric, and how the model writes an answer.

    `metric` is the configured one; None: the task's own, acc_norm where it counts both acc and acc_norm. InputError:
    the task cannot be a benchmark, or has another metric.
    """
    settings, kind = task.settings, task.settings.get("output_type", "generate_until")
    if kind not in ("multiple_choice", "generate_until"):
        raise task.refuse(f"output_type {kind}", "multiple_choice or generate_until")
    for key in ("class", "custom_dataset", "process_results", "doc_to_image", "doc_to_audio"):
        if settings.get(key):
            raise task.refuse(f"has {key}", "tasks of text, with a data set and the harness's own metrics")
    choosable = ("acc", "acc_norm") if task.has_choices else ("exact_match",)  # the harness may list only one of two
    known = ("take_first",) if task.has_choices else ("remove_whitespace", "take_first")
    filters = [step.get("function") for item in settings.get("filter_list") or () for step in item.get("filter") or ()]
    if unknown := [str(name).rpartition("/")[2] for name in filters if name not in known]:
        raise task.refuse(f"has the filter {unknown[0]}", f"no filter but {' and '.join(known)}")
    listed = settings.get("metric_list")
    if listed is None:  # then a task has all of them
        listed = [{"metric": name} for name in choosable]
    named = {item["metric"]: item for item in listed if isinstance(item, Mapping) and item.get("metric") in choosable}
    metrics = {name: item for name, item in named.items() if item.get("aggregation", "mean") == "mean"}
    if not metrics:
        raise task.refuse("has metrics of its own only", f"tasks with the metric {' or '.join(choosable)}, averaged")
    if metric is not None and metric not in choosable:
        raise InputError(f"benchmarks.{PREFIX}{task.name}.metric: got {metric!r}; allowed: {' or '.join(choosable)}")
    if task.has_choices:
        return {"metric": metric or ("acc_norm" if "acc_norm" in metrics else "acc")}
    exact_match = metrics["exact_match"]
    if exact_match.get("regexes_to_ignore"):
        raise task.refuse("exact_match has regexes_to_ignore", f"exact_match with {', '.join(_IGNORES)} or nothing")
    ignored = [name for option, name in _IGNORES.items() if exact_match.get(option)]
    ignored += ["spaces"] if "remove_whitespace" in filters else []
    return {"metric": "exact_match", "ignore": tuple(ignored), **_generation(task)}


def _generation(task: HarnessTask) -> dict[str, Any]:
    """Stop strings and maximum tokens of greedy generation, as the harness's model `hf` reads them."""
    options = dict(task.settings.get("generation_kwargs") or {})
    until = options.pop("until", task.settings.get("fewshot_delimiter", "\n\n"))
    stop = tuple(str(mark) for mark in ([until] if isinstance(until, str) else until or ()) if mark)
    counts = [count for name in _TOKENS if (count := options.pop(name, None)) is not None]
    temperature = float(options.pop("temperature", 0.0) or 0.0)
    if options.pop("do_sample", temperature > 0):
        raise task.refuse("draws its answers at random (do_sample)", "greedy generation")
    if unread := [name for name in options if name not in ("top_p", "top_k")]:  # nothing without sampling
        allowed = f"until, do_sample, temperature, top_p, top_k and {_TOKENS[0]}"
        raise task.refuse(f"generation_kwargs has {unread[0]}", allowed)
    if not stop:
        raise task.refuse("generation_kwargs.until is empty", "a text that ends an answer")
    return {"stop": stop, "max_new_tokens": int(counts[0]) if counts else 256}


def _named(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The files of tasks and groups below a folder, by name; of two with one name the first counts, as in the harness.

    Parsing all of the harness's 14,000 files, as it does, takes ten seconds.
    """
    tasks: dict[str, Path] = {}
    groups: dict[str, Path] = {}
    for file in sorted(folder.glob("**/*.yaml"), key=Path.as_posix):
        text = file.read_text(encoding="utf-8", errors="replace")
        if match := _GROUP.search(text):
            groups.setdefault(match[1], file)
        elif match := _TASK.search(text):
            tasks.setdefault(match[1], file)
    return tasks, groups


_shipped = cache(_named)  # of the harness's own files, which stay as they are


def _read(file: Path, inside: frozenset[Path] = frozenset()) -> dict[str, Any]:
    """The settings of a task file over those of the files it includes; OSError or ValueError: one cannot be read."""
    import yaml  # comes with the harness

    file = file.resolve()
    if file in inside:
        raise ValueError(f"{file.name} includes itself")

    def keep_name(loader: Any, node: Any) -> str:
        return f"{FUNCTION}{file.parent / loader.construct_scalar(node)}"

    loader: Any = type("Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
    loader.add_constructor("!function", keep_name)  # keeps a function's name instead of importing it
    try:
        settings = yaml.load(file.read_bytes(), loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError("not a table")
    includes = settings.pop("include", [])
    merged: dict[str, Any] = {}
    for name in includes if isinstance(includes, list) else [includes]:
        merged |= _read(file.parent / name, inside | {file})
    return merged | settings
