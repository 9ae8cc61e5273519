"""A Prefect server with everything of deployments/ on it, a worker for each pool, and who is told of failures."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from services import ROOT, Server, Spawn, children, environment, start_worker, until

DEPLOY = ("sh", "deployments/deploy.sh")
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass(frozen=True)
class Site:
    """What an engineer has who followed docs/how-to/nights.md."""

    server: Server
    folder: Path
    told: list[Any]  # by the webhook
    variables: dict[str, str]  # that deploy.sh had
    spawn: Spawn | None = None
    gpu_workers: list[subprocess.Popen[bytes]] = field(default_factory=list)  # each takes one stage at a time

    def start_gpu_worker(self) -> None:
        assert self.spawn
        log = self.folder / f"gpu-{len(self.gpu_workers)}.log"
        self.gpu_workers.append(start_worker(self.spawn, self.server, "gpu", log, "--limit", "1"))

    def deploy(self, *command: str, **changes: str) -> None:
        """Run deploy.sh, or another command, with its variables."""
        own = {**self.variables, **changes}
        made = subprocess.run(command or DEPLOY, cwd=ROOT, env=own, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr

    def run(self, deployment: str, parameters: dict[str, Any]) -> str:
        """Ask for a run of a deployment; returns its id."""
        found = self.server.call(f"deployments/name/{deployment}")
        asked = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.server.call(f"deployments/{found['id']}/create_flow_run", asked)["id"])

    def ended(self, run: str, seconds: float = 240) -> dict[str, Any]:
        """A run, once it has ended."""

        def look() -> dict[str, Any] | None:
            found: dict[str, Any] = self.server.call(f"flow_runs/{run}")
            return found if found["state"]["type"] in ENDED else None

        found: dict[str, Any] = until(look, seconds, f"the end of run {run}", pause=0.5)
        return found

    def retry(self, run: str) -> None:
        """What the UI's Retry does."""
        asked = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "retried by hand"}, "force": False}
        assert self.server.call(f"flow_runs/{run}/set_state", asked)["status"] == "ACCEPT"

    def told_of(self, run: str) -> list[str]:
        """What the webhook was told of a run."""
        return [told["text"] for told in self.told if f"({run})" in told["text"]]

    def task_runs(self, run: str) -> dict[str, dict[str, Any]]:
        """The task runs of a flow run by their names; where some have the same, the one that started last."""
        asked = {"flow_runs": {"id": {"any_": [run]}}, "limit": 200, "sort": "EXPECTED_START_TIME_ASC"}
        return {found["name"]: found for found in self.server.call("task_runs/filter", asked)}


@contextlib.contextmanager
def deployed(folder: Path) -> Iterator[Site]:
    """Follow docs/how-to/nights.md: a server, deploy.sh, a worker for each pool; all of it ends with the block."""
    told: list[Any] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
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
        variables = {
            **environment(server.home, server.url),
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "COLUMNS": "1000",
            "TAILORED_LLAMA_STORE": str(folder / "store"),
            "TAILORED_LLAMA_REPORTS": str(folder / "reports"),
            "TAILORED_LLAMA_DEVICE": "cpu",
            "TAILORED_LLAMA_GPUS": "2",
            "TAILORED_LLAMA_WEBHOOK": f"http://127.0.0.1:{listener.server_port}/failed",
        }
        site = Site(server, folder, told, variables, spawn)
        site.deploy()
        start_worker(spawn, server, "cpu", folder / "cpu.log")
        for _ in range(int(variables["TAILORED_LLAMA_GPUS"])):
            site.start_gpu_worker()
        yield site
    listener.shutdown()
