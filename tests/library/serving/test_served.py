"""Scores of what llama.cpp answers: its log-likelihoods and its server's answers are those of transformers."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest

import helpers
from hybrids import HYBRIDS
from tailored_llama.config import BenchmarkConfig, Work, validate_config
from tailored_llama.data import loglikelihoods
from tailored_llama.data.chat import write_chat
from tailored_llama.data.likelihoods import encode_choices
from tailored_llama.data.prompts import PROMPTS_SCHEMA
from tailored_llama.errors import InputError
from tailored_llama.evaluation import ScoreSettings, score_benchmark
from tailored_llama.models import Encoded, load_model, merge_adapter, open_gguf
from tailored_llama.serving import ChatServer, GgufSettings, ask_all, export_gguf, score_served, write_gguf
from tailored_llama.serving.llama_cpp import file_loglikelihoods
from tailored_llama.serving.server import llama_server
from tailored_llama.store import read_table, write_table

WINDOW = 16  # tokens, shorter than the prompts
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {
        "architecture": "gemma3_text",
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    **{name: {"architecture": name, "pad_token_id": 0} | HYBRIDS[name] for name in ("lfm2", "mixtral")},
}


def choices_of(context: Sequence[int], *choices: Sequence[int]) -> Encoded:
    return encode_choices([[*context, *choice][:-1] for choice in choices], choices)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihoods_of_a_file_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    changes = FAMILIES[family]
    checkpoint = helpers.add_merge(helpers.save_tiny_llama(tmp_path / "model", **changes))
    write_gguf(checkpoint, gguf_type="f32", out=tmp_path / "model.gguf")
    ids = np.random.default_rng(0).integers(1, 250, 200).tolist()
    encoded = [
        choices_of(ids[:60], [5, 6], [5, 6, 7], [9]),  # one begins another
        choices_of(ids[:3], [8]),
        choices_of(ids[:40], *([i % 250, 1 + i // 250] for i in range(300))),  # more than llama.cpp has sequences
        choices_of(ids[50:180], ids[100:110], ids[120:150]),
    ]
    model = load_model(checkpoint)
    expected = loglikelihoods(model, encoded, 1024)
    told: list[tuple[int, int]] = []
    measured = file_loglikelihoods(tmp_path / "model.gguf", encoded, lambda *done: told.append(done))
    assert told == [(i, 4) for i in (1, 2, 3, 4)]
    # llama.cpp's cache has 16 bits; a token whose state is rounded may go to other experts.
    tolerance = 0.5 if family == "mixtral" else 0.02
    for own, row in zip(measured, expected, strict=True):
        assert own == pytest.approx(row, abs=tolerance)


JOBS: dict[str, tuple[dict[str, Any], str]] = {
    "labels": ({"choices": "labels", "context": "{text} is \n"}, "harness"),
    "one begins another": ({"choices": "names"}, "harness"),
    "words": ({"metric": "exact_match", "context": "Q: {text}\nA: ", "answer": "written"}, "task"),
    "json": ({"metric": "json", "answer": "object"}, "harness"),
}


def tuned_file(folder: Path, job: str) -> tuple[BenchmarkConfig, Path, Path, Path]:
    """A job, its prompts, a tiny model that was tuned to it, and the same as a file; some rows end in white space."""
    fields, template = JOBS[job]
    rows = [
        {
            "text": f"{i} {'up' if i % 2 else 'down'}{' ' * (i % 3)}",
            "answer": i % 2,
            "labels": ["good", 'so "so"'],
            "names": ["a", "a b"],
            "written": ["yes", "no way"][i % 2],
            "object": {"a": "xy"[i % 2]},
        }
        for i in range(70)
    ]
    files = {
        name: helpers.write_jsonl(folder / f"{name}.jsonl", part)
        for name, part in (("train", rows[:50]), ("evaluation", rows[50:]))
    }
    named = {"name": "job", "context": "text", "answer": "answer"} | files | fields
    benchmark, checkpoint = BenchmarkConfig.model_validate(named), helpers.save_worded_llama(folder / "model")
    prompts = helpers.load_and_render(benchmark, folder, template=template)
    shots, adapter, out = folder / "shots", folder / "adapter", folder / "out"
    for path in (shots, adapter, out):
        path.mkdir()
    helpers.render_split(folder / "examples", shots, benchmark, "train", template, shots=42, held_out=8)
    tuning = {"shots": 42, "held_out": 8, "epochs": 12, "learning_rate": 0.02}
    config = validate_config({"tuning": tuning}).tuning
    metric = benchmark.metric or "acc"
    helpers.tune(checkpoint, shots, config, adapter, metric=metric)
    export_gguf(checkpoint, adapter, {"job": prompts}, settings=GgufSettings("f32", "job"), work=Work(out))
    merge_adapter(checkpoint, adapter, out=folder / "merged")
    return benchmark, prompts, folder / "merged", out


def predictions(folder: Path, written: bool) -> list[Any]:
    name, column = ("answers", "text") if written else ("predictions", "prediction")
    return list(pq.read_table(folder / f"{name}.parquet")[column].to_pylist())


@pytest.mark.parametrize("job", JOBS)
def test_a_server_answers_as_transformers_does(job: str, tmp_path: Path, folder: Callable[[str], Path]) -> None:
    benchmark, prompts, checkpoint, file = tuned_file(tmp_path, job)
    plain, served = folder("plain"), folder("served")
    score_benchmark(checkpoint, None, prompts, settings=ScoreSettings.of(benchmark), work=Work(plain, helpers.CPU))
    score_served(checkpoint, file, prompts, settings=ScoreSettings.of(benchmark), work=Work(served))
    measured = json.loads((served / "metrics.json").read_text())
    written = "metric" in JOBS[job][0]
    answers = [predictions(own, written) for own in (served, plain)]
    if job == "one begins another":
        assert measured["acc"] == 1.0  # a ranking never prefers the longer one
    elif job == "json":  # the schema leaves no other text
        assert all(own == other for own, other in zip(*answers, strict=True) if other in ('{"a": "x"}', '{"a": "y"}'))
        assert measured["valid_json"] == 1.0
    else:
        assert answers[0] == answers[1]
    template = str(open_gguf(file / "job-f32.gguf", "").fields["tokenizer.chat_template"].contents())
    assert measured["served"] == {
        "asked": "chat",
        "runtime": f"llama.cpp of xllamacpp {version('xllamacpp')}",
        "template": sha256(template.encode()).hexdigest(),
        "unended": 0,
    }
    assert measured["bytes"] == (file / "job-f32.gguf").stat().st_size


def test_a_row_that_is_longer_than_the_context_is_wrong(tmp_path: Path, folder: Callable[[str], Path]) -> None:
    checkpoint, prompts = helpers.save_worded_llama(tmp_path / "model"), folder("prompts")
    helpers.write_prompts(prompts, "short", helpers.words(900), "short again")
    write_chat(prompts, None)
    export_gguf(checkpoint, settings=GgufSettings("f16", "job"), work=Work(file := folder("file")))
    settings = ScoreSettings.of(BenchmarkConfig(name="boolq"))
    score_served(checkpoint, file, prompts, settings=settings, work=Work(out := folder("out")))
    first, long, last = predictions(out, written=False)
    assert long == -1
    assert {first, last} <= {0, 1}
    measured = json.loads((out / "metrics.json").read_text())
    assert measured["served"]["asked"] == "prompt"
    rows = read_table(prompts / "prompts.parquet", PROMPTS_SCHEMA).to_pydict()
    rows["continuations"][0] = [" no", " perhaps"]
    rows["is_ended"] = [False] * len(rows["example"])  # other choices, so they are ranked
    write_table(prompts / "prompts.parquet", rows, PROMPTS_SCHEMA)
    score_served(checkpoint, file, prompts, settings=settings, work=Work(out := folder("ranked")))
    assert predictions(out, written=False)[1] in (0, 1)  # without its start
    measured = json.loads((out / "metrics.json").read_text())
    assert measured["served"]["asked"] == "log-likelihoods"


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a client would have waited between its tries."""
    waited: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", Mock(sleep=waited.append))
    return waited


def refused(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_served_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = helpers.worded_gguf(tmp_path)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:5000])
    assert refused(llama_server(broken, 64, 1).__enter__).startswith(f"{broken}: llama.cpp cannot serve it (")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # it leads nowhere
    with llama_server(file, 64, 1) as (url, _):
        server = ChatServer(url).named()
        hello = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        assert server.reply(hello).ended == "length"
        told = refused(server.reply, hello | {"grammar": "root :="})
        assert "the server says 'Failed to initialize samplers: failed to parse grammar'" in told
        told = refused(ChatServer(url, "another").named)
        assert told == f"{url}: got no model another; allowed: a model that it has ({file})"
    told = refused(server.reply, hello)
    dead = "[Errno 111] Connection refused; allowed: a server that runs, as from llama-server"
    assert told == f"{url}/v1/chat/completions: {dead}"
    monkeypatch.setattr("tailored_llama.config.execution.find_spec", lambda name: None)
    told = refused(llama_server(file, 64, 1).__enter__)
    allowed = "'safetensors', or after pip install 'tailored-llama[gguf]'"
    assert told == f"serving: got {file}, which needs xllamacpp; allowed: {allowed}"


class Locked(BaseHTTPRequestHandler):
    """A server that asks a key: it sends those with the right one elsewhere, and repeats wrong ones."""

    seen: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.seen.append(key := self.headers["Authorization"])
        self.send_response(301 if (right := key == "Bearer s3cret" and "elsewhere" not in self.path) else 401)
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        told = "x" * 190 + str(key)
        self.wfile.write(b"" if right else json.dumps({"error": {"message": told}}).encode())

    def log_message(self, *told: object) -> None:
        pass


def test_a_server_that_asks_a_key_is_told_it_and_nobody_else() -> None:
    with HTTPServer(("127.0.0.1", 0), Locked) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}"
        told = [refused(ChatServer(url, key=key).named) for key in ("s3cret", "wr0ng", "")]
        http.shutdown()
    assert Locked.seen == ["Bearer s3cret", "Bearer wr0ng", None]  # a redirect is not followed
    assert "the server says '301 Moved Permanently to /elsewhere'" in told[0]
    assert "xBearer ***'" in told[1]
    assert "s3cret" not in repr(ChatServer(url, key="s3cret")) + "".join(told)


class Strange(BaseHTTPRequestHandler):
    """No server of OpenAI's protocol: what it answers is the path's last part, or nothing at all."""

    def do_GET(self) -> None:
        what = self.path.split("/")[1]
        if what != "silent":
            self.send_response(404 if what == "absent" else 200)
            self.end_headers()
            self.wfile.write({"list": b"[1]", "object": b"{}", "page": b"<html>"}.get(what, b"{}"))

    do_POST = do_GET

    def log_message(self, *told: object) -> None:
        pass


def test_a_server_that_does_not_speak_openai_s_protocol_is_refused_in_one_line() -> None:
    with HTTPServer(("127.0.0.1", 0), Strange) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{http.server_port}"
        expected = {
            "list": "got something else than an object in JSON",
            "page": "got something else than an object in JSON",
            "object": "got no list of models",
            "absent": "the server says '404 Not Found'",
            "silent": "Server disconnected without sending a response",
        }
        told = {what: refused(ChatServer(f"{root}/{what}").named) for what in expected}
        told["choice"] = refused(ChatServer(f"{root}/object").reply, {"prompt": "x"})
        http.shutdown()
    wrong = {what: told[what] for what in expected if expected[what] not in told[what]}
    assert not wrong
    assert "got an answer without a choice" in told["choice"]


class Busy(BaseHTTPRequestHandler):
    """A server that answers with what is next in `script`, a status or a `Retry-After` of 503; and then with 200."""

    script: ClassVar[list[int | str]] = []
    asked: ClassVar[list[Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body["prompt"])
        told = self.script.pop(0) if self.script else 200
        if told == 0:
            return  # the connection ends without an answer
        self.send_response(told if isinstance(told, int) else 503)
        if isinstance(told, str):
            self.send_header("Retry-After", told)
        self.end_headers()
        choice = {"text": body["prompt"] + "!", "finish_reason": "stop"}
        self.wfile.write(json.dumps({"choices": [choice], "message": "Loading model"}).encode())

    def log_message(self, *told: object) -> None:
        pass


@pytest.fixture
def busy() -> Iterator[str]:
    Busy.script.clear()
    Busy.asked.clear()
    with HTTPServer(("127.0.0.1", 0), Busy) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


PROMPTS = [{"prompt": word} for word in "abc"]


def test_a_request_that_fails_for_the_moment_is_asked_again(busy: str, waits: list[float]) -> None:
    Busy.script[:] = [200, 503, 0, 429, "7", "Thu, 01 Jan 1970 00:00:00 GMT", 200]
    assert [reply.text for reply in ask_all(ChatServer(busy), PROMPTS)] == ["a!", "b!", "c!"]
    assert Busy.asked == ["a", *"bbbbbb", "c"]
    assert waits == [0.5, 1, 2, 7, 0]


def test_what_goes_on_failing_is_told_with_its_address_and_answer(busy: str, waits: list[float]) -> None:
    Busy.script[:] = [503] * 9
    told = refused(ask_all, ChatServer(busy), PROMPTS)
    assert told == (
        f"{busy}/v1/completions: the server says 503, 'Loading model' (tries: 6); allowed: one that is ready"
    )
    Busy.script[:] = ["3600"]  # nobody waits so long
    assert "(tries: 1)" in refused(ask_all, ChatServer(busy), PROMPTS)
    Busy.asked.clear()
    Busy.script[:] = [400]
    refused(ask_all, ChatServer(busy), PROMPTS)
    assert len(Busy.asked) == 1


def test_a_run_that_failed_asks_only_what_has_no_answer_yet(
    busy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = ChatServer(busy, kept=tmp_path / "new" / "kept.jsonl")
    Busy.script[:] = [200, 200, 400]
    refused(ask_all, server, PROMPTS)
    assert server.kept
    assert not caplog.messages
    with server.kept.open("a") as file:
        file.write('\n{"request": "cut o')  # as of a process that was killed
    for told, again in {2: ["c"], 3: []}.items():
        Busy.asked.clear()
        assert [reply.text for reply in ask_all(server, PROMPTS)] == ["a!", "b!", "c!"]
        assert Busy.asked == again
        assert caplog.messages[-1] == f"{busy}: {told} answers of a run that was cut off are in {server.kept}"
    ask_all(replace(server, model="another"), PROMPTS)
    ask_all(server, [{"prompt": "a", "max_tokens": 1}])
    assert Busy.asked == ["a", "b", "c", "a"]


@pytest.mark.parametrize("url", ["http://192.168.0.9/v1", "http://127.0.0.1.example.org", "http://example.org:8080"])
def test_a_key_goes_over_http_to_this_machine_alone(url: str) -> None:
    told = refused(ChatServer, url, None, "s3cret")
    allowed = "https, or http to this machine, as others could read the key"
    assert told == f"url: got {url!r} with a key; allowed: {allowed}"
    ChatServer(url)
    for taken in ("https://example.org/v1", "http://localhost:1", "http://127.9.9.9:1", "http://[::1]:1/v1"):
        assert ChatServer(taken, key="s3cret").key


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8080", "ftp://host", "http://", "http://u:s3cret@host", "http://h?key=s3cret"]
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    told = refused(ChatServer, url)
    assert told.startswith("url: got ")
    assert "s3cret" not in told
