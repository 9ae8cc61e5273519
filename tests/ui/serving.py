"""A real Prefect server with a worker, for a browser to look at: everything it keeps lies in one folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
POOL = "processes"


@dataclass(frozen=True)
class Server:
    """A server that runs, and a process work pool with a worker that has the flow `tailor` deployed."""

    url: str
    environment: dict[str, str]

    def api(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/api/{path}", data, {"Content-Type": "application/json"})
        for _ in range(20):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code != 503:  # SQLite is busy
                    raise
                time.sleep(1)
        raise TimeoutError(f"{path}: the server stays busy")

    def start_run(self, config: Mapping[str, Any]) -> str:
        """Ask for a run of the deployment; its id."""
        deployment = self.api("deployments/name/tailor/tailor")["id"]
        return self.api(f"deployments/{deployment}/create_flow_run", {"parameters": {"config": config}})["id"]

    def task_runs(self, run: str) -> dict[str, dict[str, Any]]:
        """The task runs of a flow run by their names; where some have the same, the one that started last."""
        asked = {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return {task["name"]: task for task in self.api("task_runs/filter", asked)}

    def leaves(self, run: str, state: str, seconds: float = 60) -> None:
        """Wait until a run is no longer in a state."""
        deadline = time.monotonic() + seconds
        while self.api(f"flow_runs/{run}")["state"]["name"] == state:
            if time.monotonic() > deadline:
                raise TimeoutError(f"flow run {run} is still {state} after {seconds} s")
            time.sleep(0.2)

    def end_state(self, run: str, seconds: float = 300) -> str:
        """Wait for a run to end; the name of its last state."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.api(f"flow_runs/{run}")["state"]
            if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return str(state["name"])
            time.sleep(0.5)
        raise TimeoutError(f"flow run {run} has not ended in {seconds} s")


def chromium() -> str | None:
    """The browser: what CHROMIUM names, or the one that is installed."""
    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Start server and worker, and end both."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = kept | {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    server = Server(url, environment)
    with contextlib.ExitStack() as running:
        running.enter_context(
            _process(folder, environment, "server", "start", "--host", "127.0.0.1", "--port", str(port))
        )
        _until_healthy(server)
        _prefect(environment, "work-pool", "create", POOL, "--type", "process")
        _deploy(folder, environment)
        running.enter_context(_process(folder, environment, "worker", "start", "--pool", POOL))
        yield server


def _prefect(environment: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def _process(folder: Path, environment: dict[str, str], *arguments: str) -> Iterator[None]:
    with (folder / f"{arguments[0]}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments], env=environment, cwd=ROOT, stdout=log, stderr=log
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _until_healthy(server: Server) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            server.api("health")
            return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def _deploy(folder: Path, environment: dict[str, str]) -> None:
    """The flow as it stands in this checkout."""
    file = folder / "prefect.yaml"
    deployment = {"name": "tailor", "entrypoint": "flows.tailor.tailor", "work_pool": {"name": POOL}}
    pull = [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]
    file.write_text(yaml.safe_dump({"pull": pull, "deployments": [deployment]}))
    _prefect(environment, "deploy", "--prefect-file", str(file), "--all")
