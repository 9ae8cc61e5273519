"""A Prefect server with everything of deployments/ on it, a worker for each pool, and who is told of failures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from services import ROOT, Server, children, environment, start_worker, until


@dataclass
class Site:
    """What an engineer has who followed deployments/README.md."""

    server: Server
    folder: Path
    told: list[Any] = field(default_factory=list)  # by the webhook
    output: str = ""  # of deploy.sh

    def run(self, deployment: str, parameters: dict[str, Any]) -> str:
        """Ask for a run of a deployment; returns its id."""
        found = self.server.call(f"deployments/name/{deployment}")
        asked = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.server.call(f"deployments/{found['id']}/create_flow_run", asked)["id"])

    def ended(self, run: str, seconds: float = 240) -> dict[str, Any]:
        """A run, once it has ended."""
        final = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}

        def look() -> dict[str, Any] | None:
            found: dict[str, Any] = self.server.call(f"flow_runs/{run}")
            return found if found["state"]["type"] in final else None

        found: dict[str, Any] = until(look, seconds, f"the end of run {run}", pause=0.5)
        return found

    def retry(self, run: str) -> None:
        """What the UI's Retry does."""
        asked = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "retried by hand"}, "force": False}
        assert self.server.call(f"flow_runs/{run}/set_state", asked)["status"] == "ACCEPT"

    def task_states(self, run: str) -> dict[str, str]:
        """Task run name → state name."""
        found = self.server.call("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}, "limit": 200})
        return {task["name"]: task["state"]["name"] for task in found}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    told: list[Any] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Webhook)
    Thread(target=listener.serve_forever, daemon=True).start()
    with children() as spawn:
        server = Server(spawn, folder / "prefect")
        server.start()
        made = subprocess.run(
            ["sh", "deployments/deploy.sh"],
            cwd=ROOT,
            env={
                **environment(server.home, server.url),
                "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
                "COLUMNS": "1000",
                "TAILORED_LLAMA_STORE": str(folder / "store"),
                "TAILORED_LLAMA_WEBHOOK": f"http://127.0.0.1:{listener.server_port}/failed",
            },
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stdout + made.stderr
        for pool in ("cpu", "gpu"):
            start_worker(spawn, server, pool, folder / f"{pool}.log")
        yield Site(server, folder, told, made.stdout)
    listener.shutdown()
