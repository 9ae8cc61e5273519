"""Documents of lm-evaluation-harness's tasks as Examples: its data, its wording, its answers, loaded by itself.

The fields of an example are `context` (what the model reads), `delimiter` (what the harness puts between context and
choice), `description` (what it puts once before everything) and `solved` (the document as it stands among solved
examples). Known deviation: a train example that is also in the evaluation split is left out, as everywhere here.
"""

import glob
import hashlib
import importlib.metadata
import json
import random
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tailored_llama.config import FUNCTION, BenchmarkConfig, HarnessTask, find_task
from tailored_llama.data.builtin import Parts
from tailored_llama.data.splits import Split
from tailored_llama.errors import InputError, UnreachableError, is_transient, one_line
from tailored_llama.store import hub_commit, sha256_file

_NAMED = re.compile(f'"{FUNCTION}([^"]*)/([^"/]*)"')  # the folder and the name of a function, in settings as JSON
_FILE_FORMATS = ("arrow", "csv", "json", "parquet", "text")  # values of dataset_path that read files


def local_files(task: HarnessTask) -> dict[str, list[str]] | None:
    """The data files of a task by split; None if they are on the Hub; InputError: a file is missing."""
    path, options = _data_set(task)
    if (folder := Path(path)).is_dir():
        return {"all": [str(file) for file in sorted(folder.rglob("*")) if file.is_file()]}
    if path not in _FILE_FORMATS:
        return None
    if (named := options.get("data_files")) is None:
        raise task.refuse(f"dataset_path {path} without dataset_kwargs.data_files", "data_files beside it")
    files: dict[str, list[str]] = {}
    for split, patterns in (named if isinstance(named, Mapping) else {"train": named}).items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not (matching := sorted(glob.glob(pattern, recursive=True))):
                raise task.refuse(f"dataset_kwargs.data_files: got {pattern!r}, no such file", "local files")
            files.setdefault(str(split), []).extend(matching)
    return files


def task_identity(benchmark: BenchmarkConfig) -> dict[str, Any]:
    """Identify the documents and the wording of a task, without paths or times."""
    task = find_task(benchmark.name, benchmark.source)
    settings = {key: value for key, value in task.settings.items() if key not in ("dataset_path", "dataset_kwargs")}
    text = json.dumps(settings, default=str, ensure_ascii=False, sort_keys=True)
    identity: dict[str, Any] = {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "settings": hashlib.sha256(_NAMED.sub(r'"\2"', text).encode()).hexdigest(),
    }
    folders = {Path(folder, *name.split(".")[:-1]).parent for folder, name in _NAMED.findall(text) if "." in name}
    if python := [file for folder in folders for file in folder.glob("*.py")]:  # a module may import those beside it
        identity["python"] = sorted((file.name, sha256_file(file)) for file in python)
    path, options = _data_set(task)
    if (files := local_files(task)) is not None:
        identity["files"] = {split: [sha256_file(Path(name)) for name in names] for split, names in files.items()}
        identity["type"] = path if path in _FILE_FORMATS else "folder"
        options.pop("data_files", None)
    else:
        identity |= {"hub": path, "commit": _commit(benchmark, task)}
    options = {key: value for key, value in options.items() if key not in ("cache_dir", "revision")}
    return identity | ({"options": options} if options else {})


def _data_set(task: HarnessTask) -> tuple[str, dict[str, Any]]:
    """The path and the further arguments of `datasets.load_dataset`."""
    return str(task.settings.get("dataset_path")), dict(task.settings.get("dataset_kwargs") or {})


def _commit(benchmark: BenchmarkConfig, task: HarnessTask) -> str:
    path, options = _data_set(task)
    return hub_commit(path, benchmark.revision or options.get("revision"), "dataset")


@contextmanager
def _loaded(benchmark: BenchmarkConfig) -> Iterator[Any]:
    """The harness's own task object, with its data: local files, or the Hub data set at its commit."""
    import datasets
    import yaml
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    task = find_task(benchmark.name, benchmark.source)
    _, options = _data_set(task)
    state = random.getstate()
    with tempfile.TemporaryDirectory() as scratch:
        if local_files(task) is None:
            options["revision"] = _commit(benchmark, task)
        else:
            options.setdefault("cache_dir", scratch)  # Arrow copies of the files
        file = Path(scratch) / "task.yaml"
        file.write_text(yaml.safe_dump({"include": str(task.file), "dataset_kwargs": options}))
        random.seed(0)  # the harness's default: some tasks shuffle choices
        try:
            yield TaskManager(include_defaults=False).load(str(file))["tasks"][task.name]
        except InputError:
            raise
        except Exception as error:  # of datasets, the harness, Jinja, or the task's own functions
            kind = UnreachableError if is_transient(error) else InputError
            said = f"{type(error).__name__}: {one_line(error)}"
            raise kind(f"benchmarks.{benchmark.name}: lm-evaluation-harness cannot load it ({said})") from error
        finally:
            random.setstate(state)


def harness_parts(benchmark: BenchmarkConfig, split: Split) -> list[Parts | ValueError]:
    """Fields, choices and answer of every document of a split, or what is wrong with the document.

    The evaluation split is the one that the harness scores: test if the task has one, else validation.
    """
    if split == "train" and not (named := find_task(benchmark.name, benchmark.source)).has_train:
        raise named.refuse("no train split", "a task with a training_split")
    with _loaded(benchmark) as task:
        documents = task.training_docs() if split == "train" else task.eval_docs
        return [_parts(task, document) for document in documents]


def _parts(task: Any, document: dict[str, Any]) -> Parts | ValueError:
    description = task.resolve_field(document, task.config.description) or ""
    context = task.fewshot_context(document, num_fewshot=0, gen_prefix=task.doc_to_prefix(document))
    if not isinstance(context, str):
        return ValueError("several contexts with one continuation; allowed: one context (winogrande is built in)")
    context = context.removeprefix(description)
    target = task.doc_to_target(document)
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = list(task.doc_to_choice(document))
        if isinstance(target, list):
            return ValueError(f"doc_to_target: got {target!r:.80}; allowed: one right choice")
        answer = target if isinstance(target, int) else choices.index(target) if target in choices else -1
        requests = task.construct_requests(document, context, metadata=(None, 0, 1))
        delimiter = str(requests[0].arguments[1]).removesuffix(str(choices[0]))
    else:
        answer, delimiter = 0, task.config.target_delimiter
        if task.config.doc_to_choice is not None:
            choices = [task.doc_to_choice(document)[target]]
        else:  # the texts that count as right
            texts = target if isinstance(target, list) else [str(target)]
            choices = list(dict.fromkeys(text for text in texts if text)) or texts
    fields = {"context": context, "delimiter": delimiter, "description": description}
    return fields | {"solved": _solved(task, document)}, tuple(choices), answer


def _solved(task: Any, document: dict[str, Any]) -> str:
    """A document with its answer, as `ConfigurableTask.fewshot_context` writes solved examples."""
    shown = task.fewshot_cfg
    turn = task.build_qa_turn(
        q=task.doc_to_text(document, shown.doc_to_text),
        c=task.doc_to_choice(document, shown.doc_to_choice) if shown.doc_to_choice else None,
        a=task.doc_to_target(document, shown.doc_to_target),
        gen_prefix=task.resolve_field(document, shown.gen_prefix),
        tgt_delim=shown.target_delimiter,
        few_delim=shown.fewshot_delimiter,
    )
    return "".join(message.to_text() for message in turn)
