"""New rows get the answers that scoring gives, from a GGUF file and from a checkpoint; and a model is served."""

import json
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

import helpers
import tailored_llama as tl
from tailored_llama.cli.main import app, main
from tailored_llama.config import BenchmarkConfig, Work, validate_config
from tailored_llama.data import encode_prompt, read_chat, read_prompts, read_questions, write_chat
from tailored_llama.errors import InputError, UnreachableError
from tailored_llama.evaluation import ScoreSettings, choice_probabilities, read_chosen, score_benchmark
from tailored_llama.models import load_tokenizer
from tailored_llama.progress import silent
from tailored_llama.serving import GgufSettings, export_gguf, score_served, serve, write_chat_template
from tailored_llama.serving.gguf_writing import gguf_file
from tailored_llama.serving.llama_cpp import file_loglikelihoods
from tailored_llama.store import sha256_file

ROWS = [
    {
        "text": f'{helpers.words(60)[i:40]} "{i}"',
        "kind": f"kind {i}",
        "labels": ["good", "so so"],
        "options": [f"a{i}", "good"],
        "right": "good",
    }
    for i in range(8)
]
NEW = [{key: row[key] for key in ("text", "kind", "options")} for row in ROWS]
JOBS: dict[str, dict[str, Any]] = {
    "labels": {"context": "Text: {text}\nLabel:", "choices": "labels"},
    "options": {"context": "{text} of {kind}:", "choices": "options"},
    "written": {"context": "Q: {text}\nA:", "metric": "exact_match", "max_new_tokens": 8, "stop": ["\n"]},
}


def job(folder: Path, name: str) -> tuple[BenchmarkConfig, Path]:
    """A job, and its rendered prompts."""
    train = helpers.write_jsonl(folder / "train.jsonl", [row | {"text": f"{i} of train"} for i, row in enumerate(ROWS)])
    files = {"train": train, "evaluation": helpers.write_jsonl(folder / "rows.jsonl", ROWS)}
    benchmark = BenchmarkConfig.model_validate({"name": "job", "answer": "right"} | files | JOBS[name])
    return benchmark, helpers.load_and_render(benchmark, folder, template="harness")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.save_worded_llama(tmp_path_factory.mktemp("models") / "dense", max_position_embeddings=512)


@pytest.fixture(scope="module")
def shipped(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The finished model of every job as a GGUF file."""
    folders = {name: tmp_path_factory.mktemp(name) for name in JOBS}
    for name, folder in folders.items():
        _, prompts = job(tmp_path_factory.mktemp("rows"), name)
        export_gguf(dense, None, {"job": prompts}, settings=GgufSettings("f16", "job"), work=Work(folder))
    return folders


@pytest.mark.parametrize("name", ["labels", "written"])
def test_a_gguf_file_answers_as_it_is_scored(
    name: str, dense: Path, shipped: dict[str, Path], folder: Callable[[str], Path]
) -> None:
    benchmark, prompts = job(folder("rows"), name)
    settings, scores = ScoreSettings.of(benchmark), folder("scores")
    score_served(dense, shipped[name], prompts, settings=settings, work=Work(scores))
    with tl.load(shipped[name]) as model:
        answers = model.answers(NEW)
        texts = [model.answer(row["text"]) for row in NEW]
    chosen = read_chosen(scores, settings.metric).values()
    told = [text if name == "written" else ROWS[0]["labels"][text] for text in chosen]
    assert answers["answer"].tolist() == [str(text).strip() for text in told]
    assert [str(one) for one in texts] == answers["answer"].tolist()
    assert answers["probability"].tolist() == pytest.approx([one.probability for one in texts], rel=1e-3)
    assert answers["probability"].between(0, 1).all()
    assert answers[["text", "kind", "options"]].to_dict("records") == NEW


def test_a_label_has_the_probability_that_ranking_gives_it(folder: Callable[[str], Path]) -> None:
    benchmark, prompts = job(folder("rows"), "labels")
    tuning = validate_config({"tuning": {"shots": 8, "held_out": 0, "epochs": 20, "learning_rate": 0.02}}).tuning
    helpers.render_split(prompts.parent / "examples", shots := folder("shots"), benchmark, "train", shots=8)
    dense = helpers.save_worded_llama(folder("model"), max_position_embeddings=512)
    helpers.tune(dense, shots, tuning, adapter := folder("adapter"), metric="acc")
    export_gguf(dense, adapter, {"job": prompts}, settings=GgufSettings("f16", "job"), work=Work(out := folder("out")))
    tokenizer = load_tokenizer(dense)
    encoded = [encode_prompt(tokenizer, prompt, 512) for prompt in read_prompts(prompts, "evaluation")]
    sums = file_loglikelihoods(gguf_file(out), encoded, silent)
    with tl.load(out) as model:
        answers = model.answers(NEW)
    assert answers["answer"].tolist() == ["good"] * len(NEW)
    assert answers["probability"].tolist() == pytest.approx([np.exp(row[0]) for row in sums], rel=0.05)


def test_choices_that_differ_by_row_limit_its_answer(shipped: dict[str, Path]) -> None:
    with tl.load(shipped["options"]) as model:
        answers = model.answers(NEW)
        with pytest.raises(InputError, match=r"^row 0: column options: got None; allowed: a list of texts$"):
            model.answer("some text of some kind")
    assert all(answer in row["options"] for answer, row in zip(answers["answer"], NEW, strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_a_checkpoint_answers_as_it_is_scored(name: str, folder: Callable[[str], Path]) -> None:
    benchmark, prompts = job(folder("rows"), name)
    checkpoint, scores = helpers.save_worded_llama(folder("model"), max_position_embeddings=512), folder("scores")
    settings = ScoreSettings.of(benchmark, writes_labels=True)
    score_benchmark(checkpoint, None, prompts, settings=settings, work=Work(scores))
    assert ("written" in json.loads((scores / "metrics.json").read_text())) == (name == "labels")
    chat = read_chat(prompts)
    assert chat
    write_chat_template(checkpoint, chat)
    write_chat(checkpoint, chat)
    answers, chosen = tl.load(checkpoint).answers(NEW), read_chosen(scores, settings.metric)
    if name == "written":
        assert answers["answer"].tolist() == [str(text).strip() for text in chosen.values()]
        assert answers["probability"].between(0, 1).all()
        return
    columns = [row[str(benchmark.choices)] for row in ROWS]
    assert answers["answer"].tolist() == [own[int(i)] for own, i in zip(columns, chosen.values(), strict=True)]
    lengths = [prompt.choice_lengths for prompt in read_prompts(prompts, "evaluation")]
    sums = pd.read_parquet(scores / "predictions.parquet")["loglikelihoods"]
    rows = zip(sums, lengths, chosen.values(), strict=True)
    own = [choice_probabilities(*row, settings.metric)[int(i)] for *row, i in rows]
    assert answers["probability"].tolist() == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("kind", ["labels", "written"])
def test_messages_are_asked_by_the_base_s_chat_template(kind: str, folder: Callable[[str], Path]) -> None:
    turns = [
        [{"role": "system", "content": "Be good."}] * (i % 2)
        + [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "no"}] * (i % 3)
        + [{"role": "user", "content": f"{helpers.words(60)[i:40]}"}]
        for i in range(40)
    ]
    rows = [{"messages": [*asked, {"role": "assistant", "content": f"b{i % 2}"}]} for i, asked in enumerate(turns)]
    file, checkpoint = helpers.write_jsonl(folder("rows") / "rows.jsonl", rows), folder("model")
    helpers.save_worded_llama(checkpoint, max_position_embeddings=512)
    (benchmark,) = validate_config({"benchmarks": [{"data": file, "kind": kind}]}).benchmarks
    prompts, settings = helpers.load_and_render(benchmark, folder("job"), dense=checkpoint), ScoreSettings.of(benchmark)
    score_benchmark(checkpoint, None, prompts, settings=settings, work=Work(scores := folder("scores")))
    chat = read_chat(prompts)
    assert chat
    assert chat.template
    write_chat_template(checkpoint, chat)
    write_chat(checkpoint, chat)
    chosen = read_chosen(scores, settings.metric)
    answers = tl.load(checkpoint).answers([{"messages": turns[i]} for i in chosen])["answer"]
    assert answers.tolist() == [f"b{own}" if kind == "labels" else str(own).strip() for own in chosen.values()]


def test_rows_in_any_form_get_the_same_answers(shipped: dict[str, Path], tmp_path: Path) -> None:
    frame = pd.DataFrame(NEW, index=range(10, 18))
    frame[["text"]].to_csv(tmp_path / "new.csv", index=False)
    with tl.load(shipped["labels"]) as model:
        answers = model.answers(frame)
        assert answers.index.tolist() == frame.index.tolist()
        for rows in (Dataset.from_list(NEW), tmp_path / "new.csv", frame["text"].tolist(), NEW):
            assert model.answers(rows)["answer"].tolist() == answers["answer"].tolist()
        assert model.answers(["some words", "word " * 2000])["answer"].tolist()[1] == ""
    with pytest.raises(UnreachableError):
        model.answer("closed")


@pytest.mark.parametrize(
    ("trained", "new", "message"),
    [
        ({"prompt": "a", "completion": "b"}, {"prompt": "x"}, "x"),
        ({"instruction": "a", "input": "c", "output": "b"}, {"instruction": "x", "input": "y"}, "x\n\ny"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"messages": [{"role": "user", "content": "x"}]},
            "x",
        ),
        (
            {
                "tools": [{"name": "f"}],
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
                ],
            },
            {"tools": [{"name": "f"}], "messages": json.dumps([{"role": "user", "content": "x"}])},
            '{"name": "f"}\n\nx',
        ),
    ],
    ids=["prompt", "alpaca", "messages", "tools"],
)
def test_new_rows_are_read_as_those_that_were_tuned_on(
    trained: dict[str, Any], new: dict[str, Any], message: str, tmp_path: Path
) -> None:
    texts = (json.dumps(trained).replace('"a"', f'"a{i}"').replace('"b"', f'"b{i % 2}"') for i in range(40))
    file = helpers.write_jsonl(tmp_path / "job.jsonl", [json.loads(text) for text in texts])
    config = validate_config({"benchmarks": [file]})
    chat = read_chat(helpers.load_and_render(config.benchmarks[0], tmp_path))
    assert chat
    for row in (new, {"message": message}):
        assert read_questions(chat, [row])[0][0] == [{"role": "user", "content": message}]


def test_what_cannot_be_answered_is_one_line(
    dense: Path,
    shipped: dict[str, Path],
    tmp_path: Path,
    folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat = read_chat(shipped["options"])
    assert chat
    row = {"text": "a", "kind": "b"}
    for rows, message in (
        (
            [{"text": "a"}],
            "row 0: column kind: got None (columns: text); allowed: a text in it, or the whole message in ",
        ),
        (
            [row | {"options": ["a", "b"]}, row | {"kind": 5}],
            "row 1: column kind: got 5 (columns: text, kind); allowed: ",
        ),
        (
            [row | {"options": ["a"]}],
            "row 0: choices (options): got ['a']; allowed: two or more texts, one of which is ",
        ),
        (
            [row | {"options": ["a", 5]}],
            "row 0: choices (options): got ['a', 5]; allowed: two or more texts, one of wh",
        ),
    ):
        with pytest.raises(InputError) as refused:
            read_questions(chat, rows)
        assert str(refused.value).startswith(message)
    two = folder("two")
    for name in ("a.gguf", "b.gguf"):
        (two / name).touch()
    broken = folder("broken")
    for name in ("config.json", "chat.json"):
        (broken / name).write_text("[]")
    for place, message in (
        (tmp_path, f"{tmp_path}: got no model; allowed: a folder with one GGUF file, or a checkpoint"),
        (two, f"{two}: got a.gguf and b.gguf; allowed: a folder with one GGUF file, or a checkpoint"),
        (dense, f"{dense}/chat.json: missing or broken; allowed: a model that a run or smallest exported, whose rows "),
        (broken, f"{broken}/chat.json: missing or broken; allowed: "),
    ):
        with pytest.raises(InputError) as refused:
            tl.load(place)
        assert str(refused.value).startswith(message)
    monkeypatch.setattr("tailored_llama.config.execution.find_spec", lambda package: None)
    with pytest.raises(InputError, match=r"^serving: got .*gguf, which needs xllamacpp; allowed: 'safetensors', or"):
        tl.load(shipped["labels"])
    monkeypatch.undo()
    with tl.load(shipped["labels"]) as model, pytest.raises(InputError, match="rows: got the columns text, answer; "):
        model.answers([{"text": "a", "answer": "b"}])


def test_a_certified_model_whose_words_were_edited_is_refused(
    shipped: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(shipped["labels"], tmp_path / "own")
    certificate, chat = folder / "certificate.json", folder / "chat.json"
    hashes = {name: sha256_file(folder / name) for name in ("chat.json", "grammar.gbnf")}
    (weights,) = folder.glob("*.gguf")
    certificate.write_text(json.dumps({"model": {"sha256": {weights.name: "0" * 64, "../x": "0" * 64, **hashes}}}))
    own = chat.read_text()
    tl.load(folder).close()  # the weights are not hashed
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    told = rf"^{folder}/chat_template.jinja: not in model.sha256 of the certificate; allowed: files that it lists$"
    with pytest.raises(InputError, match=told):
        tl.load(folder)
    (folder / "chat_template.jinja").unlink()
    chat.write_text(own.replace("Label", "Kind"))
    told = rf"^{chat}: missing or changed since it was certified; allowed: SHA-256 {hashes['chat.json'][:12]}…$"
    monkeypatch.setattr(sys, "argv", ["", "answer", str(folder), "new.csv", "--out", str(tmp_path / "out.csv")])
    for refused in (lambda: tl.load(folder), lambda: serve(folder, 8123), partial(app, standalone_mode=False)):
        with pytest.raises(InputError, match=told):
            refused()
    certificate.write_text(json.dumps({"model": {"sha256": {weights.name: "0" * 64}}}))  # of the first format
    tl.load(folder).close()
    for content in ("[]", "{", '{"model": {"sha256": 1}}', "[" * 100_000):
        certificate.write_text(content)
        with pytest.raises(InputError, match=rf"^{certificate}: broken; allowed: the certificate of a proven model"):
            tl.load(folder)


def test_a_model_that_nobody_closes_ends_with_python(shipped: dict[str, Path]) -> None:
    code = "import sys; import tailored_llama as tl; model = tl.load(sys.argv[1]); model.answer('a')"
    code += "; print(model.ask.args[0].url)"
    ended = subprocess.run([sys.executable, "-c", code, shipped["labels"]], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(ended.stdout.strip(), timeout=5)


def test_what_serve_prints_gets_the_answer(shipped: dict[str, Path]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-c", "from tailored_llama.cli.main import main; main()", "serve", shipped["labels"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and their children
    with subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            _, url, *_, body = shlex.split(process.stdout.readline())
            assert url == f"http://127.0.0.1:{port}/v1/chat/completions"
            request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as reply:
                text = json.load(reply)["choices"][0]["message"]["content"]
            with tl.load(shipped["labels"]) as model:
                assert text.strip() == model.answer(json.loads(body)["messages"][0]["content"]).text
            with pytest.raises(InputError, match=rf"cannot serve it on port {port} .*, on a port that is free$"):
                serve(shipped["written"], port)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)


def test_a_checkpoint_is_served_by_vllm(
    dense: Path,
    shipped: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in (dense / "config.json", shipped["labels"] / "chat.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r": vLLM is not installed; allowed: a GGUF file, or after pip install vllm$"):
        serve(tmp_path, 8123)
    (tmp_path / "vllm").write_text("")
    (tmp_path / "vllm").chmod(stat.S_IRWXU)
    started = Mock(side_effect=SystemExit)  # it does not return
    monkeypatch.setattr(os, "execv", started)
    with pytest.raises(SystemExit):
        serve(tmp_path, 8123)
    call = capsys.readouterr().out
    assert call.startswith("curl http://127.0.0.1:8123/v1/chat/completions ")
    assert "structured_outputs" in call
    started.assert_called_once()
    assert started.call_args.args[1][1:] == ["serve", str(tmp_path), "--host", "127.0.0.1", "--port", "8123"]


@pytest.mark.parametrize(
    ("suffix", "read"),
    [(".csv", pd.read_csv), (".parquet", pd.read_parquet), (".jsonl", lambda file: pd.read_json(file, lines=True))],
    ids=["csv", "parquet", "jsonl"],
)
def test_a_file_of_rows_becomes_a_file_of_answers(
    suffix: str, read: Callable[[Path], pd.DataFrame], shipped: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    rows, out = helpers.write_jsonl(tmp_path / "new.jsonl", NEW[:3]), tmp_path / f"out{suffix}"
    monkeypatch.setattr(sys, "argv", ["", "answer", str(shipped["labels"]), rows, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    answered = read(out)
    assert answered.columns.tolist() == ["text", "kind", "options", "answer", "probability"]
    assert answered["text"].tolist() == [row["text"] for row in NEW[:3]]
    assert set(answered["answer"]) <= {"good", "so so"}
    assert not list(tmp_path.glob("*.part"))


def test_a_bad_file_is_one_line(
    shipped: dict[str, Path], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, there = Path(helpers.write_jsonl(tmp_path / "new.jsonl", [{"words": "a"}])), tmp_path / "there.csv"
    there.touch()
    for file, out, message in (
        (rows, there, f"{there}: exists; allowed: a new file"),
        (rows, tmp_path / "a.txt", f"--out: got {tmp_path}/a.txt; allowed: a .csv, .jsonl or .parquet file"),
        (tmp_path / "no.csv", tmp_path / "a.csv", f"{tmp_path}/no.csv: no such file; allowed: "),
        (rows, tmp_path / "a.csv", "row 0: column text: got None (columns: words); allowed: a text in it, or "),
    ):
        monkeypatch.setattr(sys, "argv", ["", "answer", str(shipped["labels"]), str(file), "--out", str(out)])
        with pytest.raises(SystemExit) as ended:
            main()
        error = capsys.readouterr().err
        assert (ended.value.code, error.count("\n")) == (2, 1)
        assert error.startswith(f"error: {message}")
    assert {path.name for path in tmp_path.iterdir()} == {"new.jsonl", "there.csv"}
