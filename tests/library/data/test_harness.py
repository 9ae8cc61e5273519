"""Tasks of lm-evaluation-harness as benchmarks: scored as by the harness itself, on local data."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.samplers import FirstNSampler
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from helpers import CPU, load_and_render, write_jsonl, write_own_benchmark
from tailored_llama.config import BenchmarkConfig, RunConfig, StoreConfig, Work, load_config, validate_config
from tailored_llama.data import BenchmarkSource, benchmarks, check_benchmark, harness, select_train
from tailored_llama.errors import InputError
from tailored_llama.evaluation import ScoreSettings, read_metrics, score_benchmark
from tailored_llama.evaluation.scores import PREDICTIONS_SCHEMA
from tailored_llama.evaluation.written import answers_schema
from tailored_llama.preflight import preflight
from tailored_llama.store import read_table

HF: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_size": 4, "logits_cache": False}
ACCURACIES = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
MATCH = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}


def colours(folder: Path) -> dict[str, Any]:
    own = write_own_benchmark(folder)
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": own["train"], "test": own["evaluation"]}},
        "training_split": "train",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "right",
        "metric_list": ACCURACIES,
        "metadata": {"version": 1.0},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Task files of the user's own: choices in four forms, and written answers."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    base = colours(tmp_path)
    words = [{"text": f"{i}:", "answers": ["a", "It's", f"{i}"][: 1 + i % 3]} for i in range(9)]
    written = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": write_jsonl(tmp_path / "words.jsonl", words)}},
        "validation_split": "validation",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answers}}",
        "generation_kwargs": {"until": ["\n", "z"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [MATCH | {"ignore_case": True, "ignore_punctuation": True}],
        "filter_list": [{"name": "bare", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metadata": {"version": 1.0},
    }
    (folder / "utils.py").write_text(
        "def choices(doc):\n    return [' ' + option for option in doc['options']]\n"
        "def answer(doc):\n    return doc['options'][doc['right']]\n"
    )
    write(folder, "colours", base)
    write(
        folder, "described", {"description": "Name the colour.\n\n", "fewshot_delimiter": "\n", "gen_prefix": "a"}, base
    )
    write(folder, "letters", {"doc_to_choice": ["A", "B", "C", "D"], "target_delimiter": "\n"}, base)
    write(folder, "spaced", {"target_delimiter": "", "metric_list": ACCURACIES[:1]}, base)
    with (folder / "spaced.yaml").open("a") as file:
        file.write("doc_to_choice: !function utils.choices\n")
    whole = "{{[question + options[0], question + options[1], question + options[2] + '.']}}"
    write(folder, "bare", {"doc_to_text": "", "doc_to_choice": whole, "doc_to_target": "{{right % 3}}"}, base)
    write(folder, "words", written)
    return folder


def write(folder: Path, name: str, settings: dict[str, Any], base: dict[str, Any] | None = None) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | (base or {}) | settings))


def benchmark(name: str, folder: Path | None, **fields: Any) -> BenchmarkConfig:
    run = {"benchmarks": [{"name": f"lm_eval:{name}", "source": str(folder) if folder else None} | fields]}
    return validate_config(run).benchmarks[0]


def scored(checkpoint: Path, own: BenchmarkConfig, out: Path, shots: int = 0) -> Path:
    """Load, render and score a benchmark, as a run does."""
    rendered, scores = load_and_render(own, out, num_fewshot=shots, seed=3), out / "scores"
    scores.mkdir()
    score_benchmark(checkpoint, None, rendered, settings=ScoreSettings.of(own), work=Work(scores, CPU))
    return out


@pytest.fixture(autouse=True)
def environment_is_not_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness asks pip for all packages after each evaluation, which takes longer than that."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def by_the_harness(checkpoint: Path, name: str, folder: Path, solved: list[dict[str, Any]] | None = None) -> Any:
    """The harness's own evaluation by its model `hf`; solved examples are the same for all questions."""
    manager = TaskManager(include_path=folder, include_defaults=False)  # the harness's own tasks take ten seconds
    task = manager.load(name)["tasks"][name]
    if solved:
        task.sampler = FirstNSampler(solved)
    lm = HFLM(pretrained=str(checkpoint), **HF)
    shots = len(solved) if solved else 0
    found = simple_evaluate(lm, tasks=[task], num_fewshot=shots, task_manager=manager, bootstrap_iters=0)
    return found["results"][name], found["samples"][name]


@pytest.mark.parametrize(
    ("name", "shots"), [("colours", 0), ("described", 3), ("letters", 3), ("spaced", 0), ("bare", 0)]
)
def test_choices_score_as_in_the_harness(name: str, shots: int, tiny: Path, folder: Path, tmp_path: Path) -> None:
    own = benchmark(name, folder)
    out = scored(tiny, own, tmp_path / "out", shots)
    solved = None
    if shots:
        train = benchmarks.load_examples(own, "train", "unused")
        rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
        drawn, _ = select_train(train, shots, 0, 3, benchmark=name)
        solved = [rows[example.index] for example in drawn]
    results, samples = by_the_harness(tiny, name, folder, solved)
    table = read_table(out / "scores" / "predictions.parquet", PREDICTIONS_SCHEMA).to_pylist()
    assert len(table) == len(samples) == 12
    for row, sample in zip(table, samples, strict=True):
        expected = [value for value, _ in sample["filtered_resps"]]
        assert row["loglikelihoods"] == pytest.approx(expected, rel=0, abs=1e-3)
        assert float(row["prediction"] == row["answer"]) == sample["acc"]
        assert name == "spaced" or float(row["prediction_norm"] == row["answer"]) == sample["acc_norm"]
    found = read_metrics(out / "scores")
    assert found["acc"] == pytest.approx(results["acc,none"])
    assert found["metric"] == ("acc" if name == "spaced" else "acc_norm")
    assert found[found["metric"]] == pytest.approx(results[f"{found['metric']},none"])


def test_written_answers_score_as_in_the_harness(tiny: Path, folder: Path, tmp_path: Path) -> None:
    own = benchmark("words", folder)
    assert (own.metric, own.stop, own.max_new_tokens) == ("exact_match", ("\n", "z"), 6)
    assert own.ignore == ("case", "punctuation", "spaces")
    results, samples = by_the_harness(tiny, "words", folder)
    rows = [json.loads(line) for line in (tmp_path / "words.jsonl").read_text().splitlines()]
    for row, sample in list(zip(rows, samples, strict=True))[::2]:  # what the model writes counts as right, in capitals
        row["answers"].append(sample["resps"][0][0].strip().upper() + "!")
    write_jsonl(tmp_path / "words.jsonl", rows)
    results, samples = by_the_harness(tiny, "words", folder)
    out = scored(tiny, own, tmp_path / "out")
    table = read_table(out / "scores" / "answers.parquet", answers_schema("exact_match")).to_pylist()
    assert [row["exact_match"] for row in table] == [float(sample["exact_match"]) for sample in samples]
    assert [row["text"] for row in table] == [sample["filtered_resps"][0] for sample in samples]
    found = read_metrics(out / "scores")
    assert found["exact_match"] == pytest.approx(results["exact_match,bare"])
    assert 0.5 < found["exact_match"] < 1


@pytest.mark.parametrize(
    ("ignore", "text", "accepted", "right"),
    [
        ((), "Paris", "Paris", 1),
        ((), " Paris", "Paris", 0),
        (("spaces",), " Paris\t", "Paris", 1),
        ((), "paris", "Paris", 0),
        (("case",), "paris", "Paris", 1),
        (("case",), "the paris", "Paris", 0),  # SQuAD's normal form would leave the article out
        (("punctuation",), "Paris.", "Paris", 1),
        (("numbers",), "Paris 4", "Paris ", 1),
    ],
)
def test_exact_match_ignores_what_the_task_says(ignore: Any, text: str, accepted: str, right: int) -> None:
    from lm_eval.api.metrics import exact_match_hf_evaluate

    from tailored_llama.evaluation.written import exact_match

    assert exact_match(text, [accepted], ignore) == right
    options = {f"ignore_{name}": True for name in ignore if name != "spaces"}
    said = text.strip() if "spaces" in ignore else text  # the harness's filter remove_whitespace
    assert exact_match_hf_evaluate([said], [accepted], **options)["exact_match"] == right


# What a key depends on


def key(own: BenchmarkConfig) -> str:
    return json.dumps(BenchmarkSource(own).identity(), sort_keys=True)


def test_the_key_is_made_of_documents_and_wording_not_of_paths(folder: Path, tmp_path: Path) -> None:
    before = {name: key(benchmark(name, folder)) for name in ("colours", "spaced")}
    assert str(tmp_path) not in "".join(before.values())
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    for name, old in before.items():
        assert key(benchmark(name, moved)) == old

    with (moved / "utils.py").open("a") as file:
        file.write("# changed\n")
    assert key(benchmark("spaced", moved)) != before["spaced"]
    assert key(benchmark("colours", moved)) == before["colours"]

    settings = yaml.safe_load((moved / "colours.yaml").read_text())
    write(moved, "colours", settings | {"doc_to_text": "Q: {{question}}"})
    assert key(benchmark("colours", moved)) != before["colours"]

    with (tmp_path / "evaluation.jsonl").open("a") as file:
        file.write(json.dumps({"question": "one more is", "options": ["a", "b"], "right": 0}) + "\n")
    assert key(benchmark("colours", folder)) != before["colours"]


def test_a_folder_may_be_relative(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = benchmark("spaced", folder)
    examples = benchmarks.load_examples(absolute, "evaluation", "unused")
    monkeypatch.chdir(tmp_path)
    relative = benchmark("spaced", Path("tasks"))
    assert key(relative) == key(absolute)
    assert benchmarks.load_examples(relative, "evaluation", "unused") == examples


def test_a_hub_data_set_is_loaded_at_the_commit_in_the_key(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    settings = yaml.safe_load((folder / "colours.yaml").read_text())
    files = settings.pop("dataset_kwargs")["data_files"]
    write(folder, "colours", settings | {"dataset_path": "owner/colours"})
    asked = []
    local = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        asked.append((path, options["revision"]))
        return local("json", data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(harness, "hub_commit", lambda source, revision, kind: (revision or "main") * 2)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    own, pinned = benchmark("colours", folder), benchmark("colours", folder, revision="v1")
    assert BenchmarkSource(own).identity()["identity"]["commit"] == "mainmain"
    assert len(benchmarks.load_examples(pinned, "evaluation", "unused")) == 12
    assert asked == [("owner/colours", "v1v1")]
    assert not benchmarks.is_local(own)


# What cannot be a benchmark


def read(name: str, folder: Path | None, **fields: Any) -> None:
    own = benchmark(name, folder, **fields)
    check_benchmark(own)
    benchmarks.load_examples(own, "evaluation", "unused")


def refusal(name: str, folder: Path | None, **fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(name, folder, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_alone_is_a_task_of_the_harness() -> None:
    run = load_config(None, ['benchmarks=["lm_eval:sciq", "lm_eval:triviaqa"]'])
    sciq, trivia = run.benchmarks
    assert (sciq.metric, sciq.stop) == ("acc_norm", None)
    assert (trivia.metric, trivia.stop, trivia.max_new_tokens) == ("exact_match", ("\n", ".", ","), 256)
    assert trivia.ignore == ("case", "punctuation", "spaces")
    assert benchmarks.has_train(sciq)
    assert benchmark("arc_easy", None, metric="acc").metric == "acc"
    assert validate_config(run.model_dump(mode="json")) == run


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("siq", "benchmarks: got 'lm_eval:siq', unknown; did you mean sciq"),
        ("mmlu", "benchmarks: got 'lm_eval:mmlu', a group of tasks; allowed: one task, such as mmlu_"),
        ("wikitext", "benchmarks.lm_eval:wikitext: output_type loglikelihood_rolling; allowed: multiple_choice or "),
        (
            "lambada_openai",
            "benchmarks.lm_eval:lambada_openai: output_type loglikelihood; allowed: multiple_choice or ",
        ),
        ("gsm8k", "benchmarks.lm_eval:gsm8k: has the filter regex; allowed: no filter but remove_whitespace and take"),
        ("truthfulqa_mc2", "benchmarks.lm_eval:truthfulqa_mc2: has process_results; allowed: tasks of text"),
        ("nq_open", "benchmarks.lm_eval:nq_open: exact_match has regexes_to_ignore; allowed: exact_match with "),
    ],
)
def test_a_shipped_task_that_does_not_fit_is_refused(name: str, said: str) -> None:
    assert refusal(name, None).startswith(said)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (
            "colours",
            {"metric_list": [{"metric": "mcc"}]},
            "has metrics of its own only; allowed: tasks with the metric",
        ),
        (
            "colours",
            {"class": "x.Y"},
            "has class; allowed: tasks of text, with a data set and the harness's own metrics",
        ),
        ("colours", {"doc_to_target": "{{right * 9}}"}, "lm-evaluation-harness cannot load it (IndexError: "),
        (
            "colours",
            {"doc_to_target": "{{[right, 0]}}"},
            "evaluation document 0: doc_to_target: got [0, 0]; allowed: one",
        ),
        ("colours", {"doc_to_text": "{{right}}"}, "evaluation document 0: several contexts with one continuation"),
        ("colours", {"doc_to_text": "{{nothing.here}}"}, "lm-evaluation-harness cannot load it (UndefinedError: "),
        ("colours", {"include": "gone.yaml"}, "colours.yaml: "),
        ("colours", {"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "dataset_kwargs.data_files: got 'gone"),
        (
            "words",
            {"generation_kwargs": {"do_sample": True}},
            "draws its answers at random (do_sample); allowed: greedy",
        ),
        (
            "words",
            {"generation_kwargs": {"num_beams": 3}},
            "generation_kwargs has num_beams; allowed: until, do_sample",
        ),
    ],
)
def test_an_own_task_that_does_not_fit_is_refused(name: str, changes: dict[str, Any], said: str, folder: Path) -> None:
    write(folder, name, yaml.safe_load((folder / f"{name}.yaml").read_text()) | changes)
    assert refusal(name, folder).startswith(f"benchmarks.lm_eval:{name}: {said}")


def test_fields_that_the_task_decides_are_refused(folder: Path) -> None:
    where = "benchmarks.lm_eval:colours"
    assert refusal("colours", folder, context="question") == (
        f"{where}.context: got 'question'; allowed: only in the task's own file"
    )
    assert refusal("colours", folder, metric="f1") == f"{where}.metric: got 'f1'; allowed: acc or acc_norm"
    assert refusal("words", folder, metric="acc") == (
        "benchmarks.lm_eval:words.metric: got 'acc'; allowed: exact_match"
    )
    assert refusal("colours", folder / "gone") == (
        f"{where}.source: got {str(folder / 'gone')!r}, no such folder; allowed: a folder with task files (.yaml)"
    )


def test_without_the_harness_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert refusal("sciq", None) == (
        "benchmarks: got 'lm_eval:sciq', which needs lm-evaluation-harness; allowed: after pip install "
        "'tailored-llama[lm-eval]'"
    )


# Before a run


def run_of(tiny: Path, tmp_path: Path, name: str, folder: Path, **sections: Any) -> RunConfig:
    return validate_config(
        {
            "benchmarks": [{"name": f"lm_eval:{name}", "source": str(folder)}],
            "model": {"source": str(tiny), "dtype": "float32"},
            "store": StoreConfig(root=str(tmp_path / "store"), downloads=str(tmp_path / "downloads")).model_dump(),
            "calibration": {"source": str(tmp_path / "train.jsonl"), "column": "question"},
            "perplexity": {"source": str(tmp_path / "train.jsonl"), "column": "question"},
            **sections,
        }
    )


def test_a_run_that_tunes_needs_a_train_split_that_is_large_enough(tiny: Path, folder: Path, tmp_path: Path) -> None:
    preflight(run_of(tiny, tmp_path, "colours", folder, tuning={"shots": 8, "held_out": 4}))
    with pytest.raises(InputError, match="lm_eval:colours has 24 train examples"):
        preflight(run_of(tiny, tmp_path, "colours", folder))
    with pytest.raises(InputError) as caught:
        preflight(run_of(tiny, tmp_path, "words", folder))
    assert str(caught.value) == (
        "tuning.examples: got 'benchmark', but the task lm_eval:words has no train split; allowed: tuning.examples = "
        '"none" without solved examples, and calibration and healing without prompts; or a task with a training_split'
    )
    preflight(run_of(tiny, tmp_path, "words", folder, tuning={"examples": "none"}))
    with pytest.raises(InputError, match=r"^scoring.num_fewshot: got 2, but the task lm_eval:words has no train split"):
        preflight(run_of(tiny, tmp_path, "words", folder, tuning={"examples": "none"}, scoring={"num_fewshot": 2}))
