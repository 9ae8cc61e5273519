"""What `parity` asks two servers: a row's own messages, whoever made the models."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers import CPU, write_jsonl
from tailored_llama.cli.main import app
from tailored_llama.config import SmallestConfig, build_config
from tailored_llama.evaluation import LossTest
from tailored_llama.pipeline import FolderExecutor, compare_servers
from tailored_llama.serving import ChatServer
from tailored_llama.serving.client import Reply

SYSTEM = {"role": "system", "content": "Say yes or no."}


class Recording(ChatServer):
    """A server that says yes to everything."""

    def named(self) -> "Recording":
        return self

    def reply(self, request: dict[str, Any]) -> Reply:
        asked.append(request)
        return Reply("yes", "stop")


asked: list[dict[str, Any]] = []


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def compared(tmp_path: Path, content: list[dict[str, Any]], **settings: Any) -> LossTest:
    asked.clear()
    file = write_jsonl(tmp_path / "rows.jsonl", content)
    config = build_config(SmallestConfig, {"benchmarks": [file], **settings})
    (tmp_path / "scratch").mkdir()
    run, server = FolderExecutor(tmp_path / "scratch", "", CPU), Recording("http://127.0.0.1:1")
    (test,) = compare_servers(run, config, server, server).values()
    return test


def test_a_system_message_that_all_rows_share_is_sent_to_both(tmp_path: Path) -> None:
    rows = [{"messages": [SYSTEM, turn("user", f"q{i}"), turn("assistant", ("yes", "no")[i % 2])]} for i in range(150)]
    test = compared(tmp_path, rows)
    assert (test.rows, test.dense, test.loss) == (150, 0.5, 0.0)
    assert all(request["messages"][0] == SYSTEM and len(request["messages"]) == 2 for request in asked)
    assert {request["messages"][1]["content"] for request in asked} == {f"q{i}" for i in range(150)}


@pytest.mark.parametrize("kind", ["labels", "written"])
def test_rows_of_several_turns_are_sent_as_they_are(tmp_path: Path, kind: str) -> None:
    before = [
        [*[SYSTEM] * (i % 2), turn("user", f"a{i}"), turn("assistant", "b"), turn("user", f"c{i}")] for i in range(150)
    ]
    rows = [{"messages": [*asked, turn("assistant", ("yes", "no")[i // 2 % 2])]} for i, asked in enumerate(before)]
    test = compared(tmp_path, rows, rows={"kind": kind})
    assert (test.rows, round(test.dense, 1)) == (150, 0.5)
    assert {json.dumps(request["messages"]) for request in asked} == {*map(json.dumps, before)}
    told = {json.dumps([request.get("structured_outputs"), request.get("stop")]) for request in asked}
    labels = [{"choice": [" no", " yes", "no", "yes"]}, None]
    assert [json.loads(one) for one in told] == [labels if kind == "labels" else [None, ["\n"]]]


def test_a_choice_may_be_written_with_or_without_a_layout_s_white_space(tmp_path: Path) -> None:
    rows = [{"text": f"q{i}", "label": ("yes", "no")[i % 2]} for i in range(150)]
    test = compared(tmp_path, rows, rows={"instruction": SYSTEM["content"]})
    assert (test.rows, test.dense) == (150, 0.5)
    assert {request["grammar"] for request in asked} == {'root ::= " no" | " yes" | "no" | "yes"'}
    assert {json.dumps(request["messages"]) for request in asked} == {
        json.dumps([SYSTEM, turn("user", f"q{i}")]) for i in range(150)
    }


class Handler(BaseHTTPRequestHandler):
    """A server that has one model, and says yes to whoever has the key."""

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "small"}]})

    def do_POST(self) -> None:
        asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer({"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]})

    def answer(self, content: dict[str, Any]) -> None:
        is_known = self.headers["Authorization"] == "Bearer secret"
        self.send_response(200 if is_known else 401)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_command_sends_a_key_and_takes_the_fields_of_rows(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked.clear()
    rows = write_jsonl(tmp_path / "r.jsonl", [{"a": f"q{i}", "b": f"c{i}", "c": "yes"} for i in range(150)])
    fields = [part for field in ("context=b", "answer=c", "kind=written") for part in ("--set", f"rows.{field}")]
    call = ["parity", rows, "--dense", url, "--small", url, *fields]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("BIG_KEY", "secret")
    assert "Unauthorized" in str(CliRunner().invoke(app, call).exception)  # it was not named
    call += ["--dense-key-variable", "BIG_KEY"]
    assert "Unauthorized" in str(CliRunner().invoke(app, call).exception)  # it goes to one server alone
    monkeypatch.setenv("SMALL_KEY", "secret")
    ended = CliRunner().invoke(app, [*call, "--small-key-variable", "SMALL_KEY"], catch_exceptions=False)
    assert not list((tmp_path / "cache").rglob("*.jsonl"))  # the next test asks anew
    assert (ended.exit_code, ended.stdout[:34]) == (0, "r: less than 3 points lost on 150 ")
    assert {request["messages"][0]["content"] for request in asked} == {f"c{i}" for i in range(150)}
