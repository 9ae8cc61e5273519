"""What `parity` asks two servers: a row's own messages, whoever made the models."""

from pathlib import Path
from typing import Any

from helpers import CPU, write_jsonl
from tailored_llama.config import SmallestConfig, build_config
from tailored_llama.pipeline import FolderExecutor, compare_servers
from tailored_llama.serving import ChatServer
from tailored_llama.serving.client import Reply


class Recording(ChatServer):
    """A server that says yes to everything."""

    def named(self) -> "Recording":
        return self

    def reply(self, request: dict[str, Any]) -> Reply:
        asked.append(request)
        return Reply("yes", "stop")


asked: list[dict[str, Any]] = []


def test_a_system_message_that_all_rows_share_is_sent_to_both(tmp_path: Path) -> None:
    told = {"role": "system", "content": "Say yes or no."}
    rows = [
        {
            "messages": [
                told,
                {"role": "user", "content": f"q{i}"},
                {"role": "assistant", "content": ("yes", "no")[i % 2]},
            ]
        }
        for i in range(150)
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = build_config(SmallestConfig, {"benchmarks": [file]})
    (tmp_path / "scratch").mkdir()
    run, server = FolderExecutor(tmp_path / "scratch", "", CPU), Recording("http://127.0.0.1:1")
    (test,) = compare_servers(run, config, server, server).values()
    assert (test.rows, test.loss) == (150, 0.0)
    assert all(request["messages"][0] == told and len(request["messages"]) == 2 for request in asked)
    assert {request["messages"][1]["content"] for request in asked} == {f"q{i}" for i in range(150)}
