"""docker-compose.yaml without containers: its very commands and settings, on PostgreSQL and Redis of this machine."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from services import ROOT, Server, Spawn, children, environment, free_port, kill, until
from sites import Site

pytestmark = [
    pytest.mark.deployed,
    pytest.mark.skipif(
        not all(map(shutil.which, ("initdb", "postgres", "redis-server"))),
        reason="needs initdb, postgres and redis-server in PATH",
    ),
]
COMPOSE = yaml.safe_load((ROOT / "deployments" / "docker-compose.yaml").read_text())
PASSWORD = "secret"


class Composed:
    """The file's services as processes: hosts become 127.0.0.1, ports free ones, volumes folders."""

    def __init__(self, spawn: Spawn, folder: Path) -> None:
        self.spawn, self.folder = spawn, folder
        self.ports = {"postgres:5432": free_port(), "redis:6379": free_port(), "api:4200": free_port()}

    def here(self, text: str) -> str:
        text = text.replace("5432/prefect", "5432/postgres")  # the image makes a database of POSTGRES_DB's name
        for service, port in self.ports.items():
            text = text.replace(service, f"127.0.0.1:{port}")
        text = text.replace("${TAILORED_LLAMA_STORE:-/store}", str(self.folder / "store"))
        text = text.replace("${TAILORED_LLAMA_GPUS:-1}", "1")
        return text.replace("${POSTGRES_PASSWORD:?a password}", PASSWORD)

    def environment(self, name: str) -> dict[str, str]:
        given = COMPOSE["services"][name].get("environment", {})
        found = {key: self.here(value) for key, value in given.items() if value is not None}
        if "PREFECT_REDIS_MESSAGING_HOST" in found:
            found |= {"PREFECT_REDIS_MESSAGING_HOST": "127.0.0.1"}
            found |= {"PREFECT_REDIS_MESSAGING_PORT": str(self.ports["redis:6379"])}
        found["TAILORED_LLAMA_WEBHOOK"] = ""
        return found

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a service by the file's command."""
        command = shlex.split(COMPOSE["services"][name]["command"])
        command = [str(self.ports["api:4200"]) if word == "4200" else word for word in command]
        own = environment(self.folder / "prefect", f"http://127.0.0.1:{self.ports['api:4200']}/api")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return self.spawn(command, self.folder / f"{name}.log", own | {"PATH": path} | self.environment(name))

    def start_api(self) -> None:
        self.api = self.start("api")
        health = f"http://127.0.0.1:{self.ports['api:4200']}/api/health"
        until(lambda: _is_up(health), 120, "the API", 0.5)

    def finish(self, name: str) -> None:
        """Run a service that ends by itself."""
        assert self.start(name).wait(timeout=240) == 0, (self.folder / f"{name}.log").read_text()[-2000:]


@pytest.fixture(scope="module")
def databases() -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder and a user that PostgreSQL accepts: it refuses to be root."""
    folder = Path(tempfile.mkdtemp(prefix="compose-"))
    user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    if user:
        shutil.chown(folder, "nobody", "nogroup")
    yield folder, user
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def composed(databases: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    data, user = databases
    folder = tmp_path_factory.mktemp("compose")
    (data / "password").write_text(PASSWORD)
    with children() as spawn:
        made = Composed(spawn, folder)
        port = str(made.ports["postgres:5432"])
        (data / "password").chmod(0o644)
        initdb = ["initdb", "-D", str(data / "pg"), "-U", "prefect", "-A", "scram-sha-256"]
        subprocess.run([*initdb, "--pwfile", str(data / "password")], check=True, capture_output=True, cwd=data, **user)
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={data}"]
        postgres = subprocess.Popen(["postgres", "-D", str(data / "pg"), "-p", port, *settings], cwd=data, **user)
        redis = shlex.split(COMPOSE["services"]["redis"]["command"])
        redis += ["--port", str(made.ports["redis:6379"]), "--bind", "127.0.0.1", "--dir", str(folder)]
        spawn(redis, folder / "redis.log", {})
        try:
            until(lambda: list(data.glob(".s.PGSQL.*[0-9]")), 60, "PostgreSQL")
            made.finish("migrate")
            made.start_api()
            made.start("services")
            made.finish("deploy")
            made.start("gpu-worker")  # the cpu-worker is the same command for another pool
            yield made
        finally:
            postgres.send_signal(signal.SIGINT)  # which does not wait for clients to leave
            postgres.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


def test_services_wait_for_what_they_need() -> None:
    needs = {name: set(service.get("depends_on", {})) for name, service in COMPOSE["services"].items()}
    assert needs == {
        "postgres": set(),
        "redis": set(),
        "migrate": {"postgres"},
        "api": {"migrate", "redis"},
        "services": {"migrate", "redis"},
        "deploy": {"api"},
        "cpu-worker": {"deploy"},
        "gpu-worker": {"deploy"},
    }
    for service in COMPOSE["services"].values():
        for name, need in service.get("depends_on", {}).items():
            once = need["condition"] == "service_completed_successfully"
            assert once == (COMPOSE["services"][name].get("restart") == "on-failure")
            assert once or "healthcheck" in COMPOSE["services"][name]
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"]


def test_there_is_a_worker_for_each_gpu_that_the_pool_counts() -> None:
    counted = COMPOSE["services"]["deploy"]["environment"]["TAILORED_LLAMA_GPUS"]
    worker = COMPOSE["services"]["gpu-worker"]
    assert worker["deploy"]["replicas"] == counted == "${TAILORED_LLAMA_GPUS:-1}"
    assert worker["command"] == COMPOSE["services"]["cpu-worker"]["command"].replace("cpu", "gpu --limit 1")


def test_a_stage_runs_on_it_across_a_restart_of_the_api(composed: Composed, own_run: dict[str, Any]) -> None:
    server = Server(composed.spawn, composed.folder / "prefect")
    server.url = f"http://127.0.0.1:{composed.ports['api:4200']}/api"
    site = Site(server, composed.folder, [], {})
    store = site.server.call("deployments/name/tailor/nightly")["parameters"]["config"]["store"]["root"]
    assert store == str(composed.folder / "store")
    run = site.run("tailor/one-stage", {"config": own_run, "only": "score colours dense"})
    until(lambda: site.server.call(f"flow_runs/{run}")["state"]["type"] == "PENDING", 60, "a worker that takes the run")
    kill(composed.api)
    composed.start_api()
    assert site.ended(run)["state"]["type"] == "COMPLETED"
