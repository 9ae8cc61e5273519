"""A real Prefect server, its API, and processes that die with the test."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "PYTHONPATH": str(ROOT),
    "DO_NOT_TRACK": "1",
    "COLUMNS": "1000",  # wide enough for a log's lines
    "OMP_NUM_THREADS": "1",  # bytes are compared, and threads add up in another order
}
Spawn = Callable[..., subprocess.Popen[bytes]]


@contextlib.contextmanager
def children() -> Iterator[Spawn]:
    """A function that starts a process; all of them, and all that they started, are killed at the end.

    A worker's runs are in sessions of their own and outlive it: a variable of the environment tells whose they are.
    """
    mark = f"TESTS_CHILD={uuid.uuid4().hex}"
    started: list[subprocess.Popen[bytes]] = []

    def spawn(command: list[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            started.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **SETTINGS, **environment, **dict([mark.split("=")])},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                )
            )
        return started[-1]

    try:
        yield spawn
    finally:
        for process in started:
            process.kill()  # some write their title where their environment was
        while marked := _with_variable(mark):
            for pid in marked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in started:
            process.wait()


def _with_variable(setting: str) -> list[int]:
    """Processes that have a setting in their environment."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if setting.encode() in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of a process and of all that it started."""
    for pid in [process.pid, *_descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _descendants(process: int) -> list[int]:
    children = children_of(process)
    return children + [pid for child in children for pid in _descendants(child)]


def children_of(process: int, word: str = "") -> list[int]:
    """Processes that a process started; those alone that have a word in their command line, where one is given."""
    lists = [file.read_text().split() for file in Path(f"/proc/{process}/task").glob("*/children")]
    found = [int(child) for children in lists for child in children]
    return [child for child in found if not word or word in Path(f"/proc/{child}/cmdline").read_text()]


def until(condition: Callable[[], Any], seconds: float, what: str, pause: float = 0.05) -> Any:
    """Wait for a condition to hold, and return what it returned."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(pause)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`prefect server start` on a port and a database that outlast the process."""

    def __init__(self, spawn: Spawn, home: Path, login: tuple[str, str] | None = None) -> None:
        self._spawn, self.home, self.port = spawn, home, free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self._process: subprocess.Popen[bytes] | None = None
        self._client = httpx.Client(
            timeout=60, auth=login
        )  # one for all calls: a new one reads the machine's certificates anew

    @property
    def pages(self) -> str:
        """Where the UI is."""
        return self.url.removesuffix("/api")

    def start(self) -> None:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        self._process = self._spawn(command, self.home.with_suffix(".log"), environment(self.home, self.url))
        until(self._is_up, 120, "the server's start", pause=0.2)

    def kill(self) -> None:
        assert self._process
        kill(self._process)

    def _is_up(self) -> bool:
        assert self._process
        assert self._process.poll() is None, self.home.with_suffix(".log").read_text()
        with contextlib.suppress(httpx.HTTPError):
            return self._client.get(f"{self.url}/health").status_code == 200
        return False

    def call(self, path: str, data: Mapping[str, Any] | None = None) -> Any:
        """POST data to a route of the API, or GET it where there are none."""
        return self._ask("GET" if data is None else "POST", path, data).json()

    def change(self, path: str, data: Mapping[str, Any]) -> None:
        """PATCH what is at a route of the API."""
        self._ask("PATCH", path, data)

    def _ask(self, method: str, path: str, data: Mapping[str, Any] | None) -> httpx.Response:
        """Ask again while SQLite is busy."""
        for _ in range(20):
            answer = self._client.request(method, f"{self.url}/{path}", json=data)
            if answer.status_code != 503:
                break
            time.sleep(0.5)
        assert answer.is_success, f"{answer.status_code} for {path}: {answer.text}"
        return answer

    def newest_run(self) -> dict[str, Any]:
        """The flow run that began last."""
        found: dict[str, Any] = self.call("flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})[0]
        return found


def environment(home: Path, url: str) -> dict[str, str]:
    """What makes a process use one server, and nothing of the user's own Prefect."""
    return {"PREFECT_HOME": str(home), "PREFECT_API_URL": url, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}


def tailor_here(configuration: dict[str, Any], url: str) -> None:
    """Flow `tailor` in this process, on the server at a URL: no Python has to start, and nothing is drawn."""
    # Prefect reads its environment when it is loaded, and tests/performance/dispatch.py sets that after this module is.
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.compositions import tailor
    from pictures import blank_pictures
    from tailored_llama.config import validate_config

    with temporary_settings({PREFECT_API_URL: url}), blank_pictures():
        tailor(validate_config(configuration))


def deploy(server: Server, pool: str) -> str:
    """A work pool of processes with a deployment of the flow `tailor`; returns the deployment's id."""
    server.call("work_pools/", {"name": pool, "type": "process"})
    flow = server.call("flows/", {"name": "tailor"})
    deployment = {
        "name": pool,
        "flow_id": flow["id"],
        "entrypoint": "flows.compositions.tailor",
        "work_pool_name": pool,
        "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}],
        "enforce_parameter_schema": False,
    }
    return str(server.call("deployments/", deployment)["id"])


def start_worker(spawn: Spawn, server: Server, pool: str, log: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", *options]
    # Where three workers ask every second, their server spends a tenth of a core on answers.
    return spawn(command, log, environment(server.home, server.url) | {"PREFECT_WORKER_QUERY_SECONDS": "3"})
