"""docker-compose.yaml without containers: its very commands and settings, on PostgreSQL and Redis of this machine."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pathspec
import pytest
import yaml

from services import ROOT, Server, Spawn, children, environment, free_port, kill, until
from sites import Site

pytestmark = pytest.mark.deployed
FILE = (ROOT / "deployments" / "docker-compose.yaml").read_text()
SET = {"POSTGRES_PASSWORD": "secret", "REDIS_PASSWORD": "hidden", "PREFECT_API_AUTH_STRING": "somebody:in-private"}
LOGIN = ("somebody", "in-private")


def compose(variables: Mapping[str, str]) -> dict[str, Any]:
    """What docker compose makes of the file and of ${NAME:-default} and ${NAME:?required} in it."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        if kind == "?" and not variables.get(name):
            raise ValueError(f"required variable {name} is missing a value: {rest}")
        return variables.get(name) or rest

    composed: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{(\w+):([-?])([^}]*)\}", value, FILE))
    return composed


COMPOSE = compose(SET)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def user_of(service: dict[str, Any]) -> str:
    """Who runs a service's commands: its user, or that of the image."""
    if "build" not in service:
        return str(service["user"])
    dockerfile = (ROOT / service["build"]["dockerfile"]).read_text()
    return str(service.get("user") or re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE)[-1])


def confined(service: dict[str, Any], folder: Path) -> list[str]:
    """A command before a service's that gives it the user, and takes the rights, that its container has.

    Python may be in a folder of root's, so that the one right to read everything stays. Empty if we may not do that.
    """
    user, group = user_of(service).split(":")
    right = "-all,+dac_read_search" if service["cap_drop"] == ["ALL"] else "+all"
    rights = ["--inh-caps", right, "--ambient-caps", right, "--bounding-set", right]
    privileges = ["--no-new-privs"] if "no-new-privileges:true" in service["security_opt"] else []
    command = ["setpriv", "--reuid", user, "--regid", group, "--clear-groups", *rights, *privileges]
    if os.geteuid() or subprocess.run([*command, "true"], capture_output=True).returncode:
        return []
    os.chown(folder, int(user), int(group))
    return command


class Composed:
    """The file's services as processes: hosts become 127.0.0.1, ports free ones, volumes folders."""

    def __init__(self, spawn: Spawn, folder: Path) -> None:
        self.spawn, self.folder = spawn, folder
        self.ports = {"postgres:5432": free_port(), "redis:6379": free_port(), "api:4200": free_port()}
        variables = {"TAILORED_LLAMA_STORE": str(folder / "store"), "TAILORED_LLAMA_DEVICE": "cpu"}
        self.services: dict[str, dict[str, Any]] = compose(SET | variables)["services"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['api:4200']}/api"

    def here(self, text: str) -> str:
        text = text.replace("5432/prefect", "5432/postgres")  # the image makes a database of POSTGRES_DB's name
        for service, port in self.ports.items():
            text = text.replace(service, f"127.0.0.1:{port}")
        return text

    def environment(self, name: str) -> dict[str, str]:
        given = self.services[name].get("environment", {})
        found = {key: self.here(str(value)) for key, value in given.items() if value is not None}
        if "PREFECT_REDIS_MESSAGING_HOST" in found:
            found |= {"PREFECT_REDIS_MESSAGING_HOST": "127.0.0.1"}
            found |= {"PREFECT_REDIS_MESSAGING_PORT": str(self.ports["redis:6379"])}
        return found

    def command(self, name: str) -> list[str]:
        command = self.services[name]["command"]
        return shlex.split(command) if isinstance(command, str) else list(command)

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a service by the file's command, as its container's user."""
        command = [str(self.ports["api:4200"]) if word == "4200" else word for word in self.command(name)]
        own = environment(self.folder / "prefect", self.url) | {"HOME": str(self.folder)}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        command = confined(self.services[name], self.folder) + command
        return self.spawn(command, self.folder / f"{name}.log", own | {"PATH": path} | self.environment(name))

    def start_api(self) -> None:
        self.api = self.start("api")
        until(lambda: _status(f"{self.url}/health") == 200, 120, "the API", 0.5)

    def finish(self, name: str) -> None:
        """Run a service that ends by itself."""
        assert self.start(name).wait(timeout=240) == 0, (self.folder / f"{name}.log").read_text()[-2000:]


@pytest.fixture(scope="module")
def databases() -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder and a user that PostgreSQL accepts: it refuses to be root."""
    for program in ("initdb", "postgres", "redis-server", "redis-cli"):
        if not shutil.which(program):
            pytest.skip(f"needs {program} in PATH")
    folder = Path(tempfile.mkdtemp(prefix="compose-"))
    user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    if user:
        folder.chmod(0o711)
        shutil.chown(folder, "nobody", "nogroup")
    yield folder, user
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def composed(databases: tuple[Path, dict[str, Any]]) -> Iterator[Composed]:
    data, user = databases
    folder = data / "services"
    folder.mkdir()
    with children() as spawn:
        made = Composed(spawn, folder)
        port = str(made.ports["postgres:5432"])
        (data / "password").write_text(SET["POSTGRES_PASSWORD"])
        (data / "password").chmod(0o644)
        initdb = ["initdb", "-D", str(data / "pg"), "-U", "prefect", "-A", "scram-sha-256"]
        subprocess.run([*initdb, "--pwfile", str(data / "password")], check=True, capture_output=True, cwd=data, **user)
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={data}"]
        postgres = subprocess.Popen(["postgres", "-D", str(data / "pg"), "-p", port, *settings], cwd=data, **user)
        redis = made.command("redis")
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


def _status(url: str, login: tuple[str, str] | None = None) -> int | None:
    """The status of an answer; None: there is none."""
    try:
        return httpx.get(url, auth=login).status_code
    except httpx.HTTPError:
        return None


@pytest.mark.parametrize("name", SET)
def test_without_a_password_nothing_is_composed(name: str) -> None:
    with pytest.raises(ValueError, match=f"required variable {name} is missing"):
        compose(SET | {name: ""})


def test_no_container_is_root_s_or_may_gain_rights() -> None:
    for name, service in SERVICES.items():
        assert user_of(service).split(":")[0] not in ("root", "0"), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "cap_add" not in service, name
        assert not service.get("privileged"), name


def test_no_secret_s_file_enters_the_image() -> None:
    ignored = [
        f"/{line}" for line in (ROOT / ".dockerignore").read_text().split()
    ]  # as Docker reads them: from the top
    secret = [".env", "deployments/.env", "deployments/.env.production", "deployments/tls/server.key", "ca.pem"]
    assert set(pathspec.GitIgnoreSpec.from_lines(ignored).match_files(secret)) == set(secret)
    needed = ["deployments/deploy.sh", "pyproject.toml", "tailored_llama/data/general_words.parquet"]
    assert not list(pathspec.GitIgnoreSpec.from_lines(ignored).match_files(needed))


def test_services_wait_for_what_they_need() -> None:
    needs = {name: set(service.get("depends_on", {})) for name, service in SERVICES.items()}
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
    for service in SERVICES.values():
        for name, need in service.get("depends_on", {}).items():
            once = need["condition"] == "service_completed_successfully"
            assert once == (SERVICES[name].get("restart") == "on-failure")
            assert once or "healthcheck" in SERVICES[name]
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"]


def test_there_is_a_worker_for_each_gpu_that_the_pool_counts() -> None:
    services = compose(SET | {"TAILORED_LLAMA_GPUS": "3"})["services"]
    worker = services["gpu-worker"]
    assert str(worker["deploy"]["replicas"]) == str(services["deploy"]["environment"]["TAILORED_LLAMA_GPUS"]) == "3"
    assert worker["command"] == services["cpu-worker"]["command"].replace("cpu", "gpu --limit 1")
    assert worker["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"
    assert services["deploy"]["environment"]["TAILORED_LLAMA_DEVICE"] == "cuda"


def test_neither_the_api_nor_redis_answers_a_stranger(composed: Composed) -> None:
    for login in (None, ("somebody", "else")):
        assert _status(f"{composed.url}/collections/views/aggregate-worker-metadata", login) == 401
    assert _status(f"{composed.url}/collections/views/aggregate-worker-metadata", LOGIN) == 200
    assert httpx.get(f"{composed.url.removesuffix('/api')}/ui-settings").json()["auth"] == "BASIC"  # the UI asks, too

    kind, program, *rest = composed.services["redis"]["healthcheck"]["test"]
    check = [program, "-p", str(composed.ports["redis:6379"]), *rest]
    assert kind == "CMD"
    for variables, healthy in (({}, False), (composed.environment("redis"), True)):
        ended = subprocess.run(check, env={"PATH": os.environ["PATH"], **variables}, capture_output=True, text=True)
        assert (ended.returncode == 0, "NOAUTH" in ended.stderr + ended.stdout) == (healthy, not healthy)


def test_a_stage_runs_on_it_across_a_restart_of_the_api(composed: Composed, own_run: dict[str, Any]) -> None:
    server = Server(composed.spawn, composed.folder / "prefect", LOGIN)
    server.url = composed.url
    site = Site(server, composed.folder, [], {})
    config = site.server.call("deployments/name/tailor/nightly")["parameters"]["config"]
    assert config["store"]["root"] == str(composed.folder / "store")
    own_run |= {"store": {"root": str(composed.folder / "store"), "downloads": str(composed.folder / "downloads")}}
    run = site.run("tailor/one-stage", {"config": own_run, "only": "score colours dense"})
    until(lambda: site.server.call(f"flow_runs/{run}")["state"]["type"] == "PENDING", 60, "a worker that takes the run")
    kill(composed.api)
    composed.start_api()
    assert site.ended(run)["state"]["type"] == "COMPLETED"
    completed = {"event": {"name": ["prefect.flow-run.Completed"]}, "resource": {"id": [f"prefect.flow-run.{run}"]}}
    until(
        lambda: site.server.call("events/filter", {"filter": completed})["events"], 60, "its event, through Redis", 0.5
    )
