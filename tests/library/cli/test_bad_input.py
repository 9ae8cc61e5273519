"""Bad input: one clear line, before any work, and nothing half-written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import COLOURS
from tailored_llama.config import validate_config
from tailored_llama.errors import InputError
from tailored_llama.models.families import ALLOWED
from tailored_llama.preflight import preflight
from tailored_llama.store import artifacts

Run = dict[str, Any]


def check(run: Run) -> None:
    preflight(validate_config(run))


@pytest.fixture
def own_run(own_run: Run, tiny: Path, tmp_path: Path) -> Run:
    """The shared run on a copy of the model, so that this one may be broken."""
    shutil.copytree(tiny, tmp_path / "model")
    own_run["model"]["source"] = str(tmp_path / "model")
    return own_run


def test_a_run_on_own_model_and_own_data_passes_and_writes_nothing(own_run: Run) -> None:
    check(own_run)
    assert not list(Path(own_run["store"]["root"]).iterdir())
    assert not list(Path(own_run["store"]["downloads"]).iterdir())


def put(section: str, key: str, value: Any) -> Callable[[Run, Path], None]:
    def change(run: Run, place: Path) -> None:
        run.setdefault(section, {})[key] = value

    return change


def own(key: str, value: Any) -> Callable[[Run, Path], None]:
    def change(run: Run, place: Path) -> None:
        run["benchmarks"][0][key] = value

    return change


def benchmark(value: Any) -> Callable[[Run, Path], None]:
    def change(run: Run, place: Path) -> None:
        run["benchmarks"] = [value]

    return change


def rows(file: str, *changes: dict[str, Any]) -> Callable[[Run, Path], None]:
    """Replace a data file by as many rows, each changed."""
    good = {"question": "the sky is", "options": list(COLOURS), "right": 1}

    def change(run: Run, place: Path) -> None:
        (place / "data" / file).write_text("".join(json.dumps(good | row) + "\n" for row in changes))

    return change


def write(file: str, content: bytes) -> Callable[[Run, Path], None]:
    def change(run: Run, place: Path) -> None:
        (place / file).write_bytes(content)

    return change


def delete(file: str) -> Callable[[Run, Path], None]:
    def change(run: Run, place: Path) -> None:
        (place / file).unlink()

    return change


def own_template(tables: str) -> Callable[[Run, Path], None]:
    def change(run: Run, place: Path) -> None:
        (place / "mine.toml").write_text(f'name = "mine"\nsource = "me"\n{tables}')
        run["prompts"] = {"template": "{place}/mine.toml"}

    return change


def written_with_letters(run: Run, place: Path) -> None:
    run["benchmarks"][0]["metric"] = "exact_match"
    del run["benchmarks"][0]["choices"]
    run["prompts"] = {"template": "lettered"}


def below_a_file(key: str) -> Callable[[Run, Path], None]:
    def change(run: Run, place: Path) -> None:
        (place / "file").touch()
        run["store"][key] = str(place / "file" / "store")

    return change


def cut_weights(run: Run, place: Path) -> None:
    weights = place / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


TEMPLATES = "generic, harness, lettered, reread, task, task-2, task-3"
SEVEN = "boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa"
NEW_NAME = (
    f"allowed: {SEVEN}, csqa, a .csv, .jsonl, .json or .parquet file, or a new name with train, evaluation, "
    "context, choices and answer"
)
COLUMNS = "(not set: context, choices, answer, evaluation)"
NO_ANSWER = "which is none of the 4 choices; allowed: an index from 0 to 3, a letter from A to D, or a choice's text"
CASES: dict[str, tuple[Callable[[Run, Path], Any], str]] = {
    "ratio 0": (put("pruning", "ratios", [0]), "pruning.ratios.0: got 0; allowed: greater than 0"),
    "ratio 1": (put("pruning", "ratios", [1]), "pruning.ratios.0: got 1; allowed: less than 1"),
    "ratio 1.5": (put("pruning", "ratios", [1.5]), "pruning.ratios.0: got 1.5; allowed: less than 1"),
    "unknown criterion": (
        put("pruning", "criterion", "magnitude_l3"),
        "pruning.criterion: got 'magnitude_l3'; allowed: 'taylor_gate', 'taylor_first', 'magnitude_l2' or 'random'",
    ),
    "unknown template": (
        put("prompts", "template", "harnes"),
        f"prompts.template: got 'harnes', no such template set; allowed: {TEMPLATES}, or a .toml file",
    ),
    "template file missing": (
        put("prompts", "template", "{place}/mine.toml"),
        f"prompts.template: got '{{place}}/mine.toml', no such file; allowed: {TEMPLATES}, or a .toml file",
    ),
    "template file with an unknown field of the benchmark": (
        own_template('[own]\nlayout = "{qestion}"\n'),
        "prompts.template {place}/mine.toml: own.layout: got {{qestion}}; allowed: context, choice, choices[0], "
        "choices[1], listed, letter",
    ),
    "template for other benchmarks": (
        own_template('[boolq]\nlayout = "{question}"\n'),
        "template mine: no table [own]; present: boolq",
    ),
    "letters where the model writes the answer": (
        written_with_letters,
        "template lettered: shows the choices; allowed: a set without choices, since the model writes the answers of "
        "colours",
    ),
    "unknown key": (put("tuning", "lora_rank", 4), "tuning.lora_rank: unknown key; did you mean tuning.rank?"),
    "unknown benchmark": (benchmark("mmlu"), f"benchmarks: got 'mmlu', unknown; {NEW_NAME} {COLUMNS}"),
    "one file that is not there": (
        benchmark("nowhere.csv"),
        "benchmarks.nowhere.data: got 'nowhere.csv', no such file; allowed: a .csv, .jsonl, .json or .parquet file",
    ),
    "one file beside two": (
        own("data", "{place}/data/train.jsonl"),
        "benchmarks.colours.train: got '{place}/data/train.jsonl'; allowed: only without `data`",
    ),
    "model missing": (
        put("model", "source", "/nowhere/llama"),
        "model.source /nowhere/llama: no such file or folder; allowed: smollm2-135m-instruct, gemma-3-270m, a "
        "folder, a .gguf file, "
        "or a Hub id (owner/name)",
    ),
    "model unsupported": (
        write("model/config.json", b'{"model_type": "t5"}'),
        "model.source {place}/model: architecture t5; {supported}",
    ),
    "model cut short": (
        cut_weights,
        "{place}/model/model.safetensors: not a whole safetensors file (Error while deserializing header: incomplete "
        "metadata, file not fully covered)",
    ),
    "model without tokenizer": (
        delete("model/tokenizer.json"),
        "model.source {place}/model: no tokenizer; allowed: a folder with tokenizer.json, tokenizer.model or "
        "vocab.json",
    ),
    "data missing": (
        delete("data/evaluation.jsonl"),
        "{place}/data/evaluation.jsonl: no such file; allowed: a .csv, .jsonl, .json or .parquet file",
    ),
    "train data missing": (
        delete("data/train.jsonl"),
        "{place}/data/train.jsonl: no such file; allowed: a .csv, .jsonl, .json or .parquet file",
    ),
    "no train data": (
        lambda run, place: run["benchmarks"][0].pop("train"),
        "benchmarks.colours.train: not set; allowed: a .csv, .jsonl, .json or .parquet file",
    ),
    "data empty": (
        write("data/evaluation.jsonl", b""),
        "{place}/data/evaluation.jsonl: holds no rows; allowed: at least one",
    ),
    "data damaged": (
        write("data/evaluation.jsonl", b'{"question": '),
        "{place}/data/evaluation.jsonl line 1: got '{{\"question\": '; allowed: one JSON object a line, or one list of "
        "them",
    ),
    "column missing": (
        own("answer", "correct"),
        "benchmarks.colours: evaluation.jsonl: no column 'correct'; present: question, options, right",
    ),
    "key missing in a row": (
        write(
            "data/evaluation.jsonl",
            b'{"question": "a", "options": ["x", "y"], "right": 0}\n{"options": ["x", "y"], "right": 0}\n',
        ),
        "benchmarks.colours: evaluation.jsonl row 1: column question: got None; allowed: a text",
    ),
    "answer too high": (
        rows("evaluation.jsonl", {}, {"right": 4}),
        f"benchmarks.colours: evaluation.jsonl row 1: column right: got 4, {NO_ANSWER}",
    ),
    "answer no choice": (
        rows("evaluation.jsonl", {"right": "purple"}),
        f"benchmarks.colours: evaluation.jsonl row 0: column right: got 'purple', {NO_ANSWER}",
    ),
    "answer missing": (
        rows("evaluation.jsonl", {}, {"right": None}),
        f"benchmarks.colours: evaluation.jsonl row 1: column right: got None, {NO_ANSWER}",
    ),
    "one choice": (
        rows("evaluation.jsonl", {"options": ["red"], "right": 0}),
        "benchmarks.colours: evaluation.jsonl row 0: choices: got 1; allowed: at least 2",
    ),
    "train in evaluation": (
        lambda run, place: shutil.copy(place / "data" / "evaluation.jsonl", place / "data" / "train.jsonl"),
        "benchmarks.colours.train: each of its 12 rows is also in the evaluation split; allowed: a train split with "
        "rows of its own",
    ),
    "more shots than train": (
        put("tuning", "shots", 21),
        "tuning.shots: got 21, beside 4 to hold out (tuning.held_out); allowed: at most 24 together, the train "
        "examples of colours to draw from",
    ),
    "perplexity of the run's prompts": (
        put("perplexity", "source", "prompts"),
        "perplexity.source: got 'prompts'; allowed: a text of its own; prompts is for calibration",
    ),
    "calibration text missing": (
        put("calibration", "source", "/nowhere/text.txt"),
        f"calibration.source: got '/nowhere/text.txt', no such file; allowed: {SEVEN}, csqa, a .txt file, "
        "a .csv, .jsonl, .json or .parquet file, or a Hub data set (owner/name)",
    ),
    "perplexity text without its column": (
        put("perplexity", "source", "{place}/data/train.jsonl"),
        "{place}/data/train.jsonl: no column 'passage'; present: question, options, right",
    ),
    "text not UTF-8": (write("data/text.txt", b"caf\xe9"), "{place}/data/text.txt: not UTF-8 text (byte 3)"),
    "no GPU": (
        put("execution", "device", "cuda"),
        "execution.device: got 'cuda'; allowed here: auto or cpu (no CUDA device)",
    ),
    "store below a file": (
        below_a_file("root"),
        "store.root: got '{place}/file/store', Not a directory; allowed: a writable folder with room",
    ),
    "downloads below a file": (
        below_a_file("downloads"),
        "store.downloads: got '{place}/file/store', Not a directory; allowed: a writable folder with room",
    ),
    "store of an unknown kind": (
        put("store", "root", "ftps3://x"),
        "store.root: got 'ftps3://x', Protocol not known: ftps3; allowed: a folder or an fsspec URL",
    ),
}


@pytest.mark.parametrize(("change", "message"), CASES.values(), ids=CASES)
def test_one_line_says_what_is_wrong_and_nothing_is_written(
    own_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Run, Path], Any], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(artifacts.ArtifactStore, "build", lambda *a, **k: pytest.fail("work was begun"))
    root = Path(own_run["store"]["root"])
    change(own_run, tmp_path)
    run = json.loads(json.dumps(own_run).replace("{place}", str(tmp_path)))
    expected = message.format(place=tmp_path, supported=ALLOWED)
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$") as caught:
        check(run)
    assert "\n" not in str(caught.value)
    assert not root.exists() or not list(root.iterdir())


def test_a_full_disk_is_found_before_any_work(own_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", refuse)
    root = own_run["store"]["root"]
    message = f"store.root: got '{root}', No space left on device; allowed: a writable folder with room"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check(own_run)
    assert not list(Path(root).iterdir())
