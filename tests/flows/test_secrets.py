"""A password is in no text that a run prints or stores, and a URL with one is refused before anything is stored."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.utils import infer_storage_options
from prefect.exceptions import ParameterTypeError
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_SERVER_DATABASE_CONNECTION_URL
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate

import flows.own
from compositions import status_of
from flows.__main__ import app
from flows.compositions import FLOWS, tailor
from flows.housekeeping import housekeeping
from helpers import as_toml
from services import ROOT
from tailored_llama.errors import InputError
from tailored_llama.store import ArtifactStore

SECRET = "c0rrect/h0rse"
WITH_SECRET = f"vault://ada:{SECRET}@host/store"
WITHOUT = "vault://ada@host/store"


class Vault(MemoryFileSystem):
    """A server that asks for a password, and whose library writes it into its errors."""

    protocol, cachable = "vault", False
    fails = 0

    def __init__(self, host: str, username: str, password: str = "") -> None:
        assert password == SECRET
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(infer_storage_options(path)["path"])

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        options = infer_storage_options(path)
        return {name: options[name] for name in ("host", "username", "password") if name in options}

    def put_file(self, *arguments: Any, **named: Any) -> None:
        if Vault.fails:
            Vault.fails -= 1
            raise ConnectionError(f"no answer from {WITH_SECRET} and https://host/?X-Token={SECRET}")
        super().put_file(*arguments, **named)


@pytest.fixture
def texts(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Any:
    """What has been printed, logged and written, by where: all files of the test, and the server's database."""

    def read() -> Iterator[tuple[str, bytes]]:
        APILogWorker.instance().drain()
        database = Path(PREFECT_SERVER_DATABASE_CONNECTION_URL.value().partition(":///")[2])
        yield from ((name, text.encode()) for name, text in zip(("stdout", "stderr"), capfd.readouterr(), strict=True))
        yield "log", caplog.text.encode()
        files = [*database.parent.iterdir(), *tmp_path.rglob("*")]
        yield from ((str(path), path.read_bytes()) for path in files if path.is_file())
        yield from ((name, bytes(file.getvalue())) for name, file in Vault.store.items())

    return lambda: dict(read())


@pytest.fixture(autouse=True)
def _vault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("vault", Vault, clobber=True)
    monkeypatch.setattr(Vault, "store", {})
    monkeypatch.setenv("HOME", str(tmp_path))  # where working copies are
    fsspec.config.set_conf_env(conf := dict[str, Any](), {"FSSPEC_VAULT_PASSWORD": SECRET})  # as fsspec reads it
    monkeypatch.setitem(fsspec.config.conf, "vault", conf["vault"])


@pytest.mark.usefixtures("no_delay")
def test_a_password_of_the_environment_is_nowhere(own_run: dict[str, Any], tmp_path: Path, texts: Any) -> None:
    own_run["store"]["root"] = WITHOUT
    (tmp_path / "run.toml").write_text(as_toml(own_run))
    Vault.fails = 5
    assert status_of(app, ["tailor", str(tmp_path / "run.toml")]) == 2
    Vault.fails = 1
    assert status_of(app, ["tailor", str(tmp_path / "run.toml")]) == 0
    found = texts()
    assert b"vault://ada:***@host/store" in found["log"]  # of both tries
    assert any(b"vault://ada:***@host/store" in text for name, text in found.items() if "prefect-test.db" in name)
    assert any(name.endswith("report.html") for name in found)
    assert [name for name, text in found.items() if SECRET.encode() in text] == []


def test_a_url_with_a_password_is_refused_and_not_stored(
    own_run: dict[str, Any], tmp_path: Path, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path := tmp_path / "run.toml").write_text(as_toml(own_run))
    assert status_of(app, ["tailor", str(path), "--set", f"store.root={WITH_SECRET}"]) == 2
    assert status_of(app, ["tailor", str(path), "--set", f"store.root {WITH_SECRET}"]) == 2
    assert status_of(flows.own.app, [str(path), "--set", f"model.source={WITH_SECRET}"]) == 2
    with pytest.raises(InputError, match=r"^store.root: got 'vault://ada:\*\*\*@host/store'; allowed: a URL without"):
        ArtifactStore(WITH_SECRET)
    monkeypatch.setenv("TAILORED_LLAMA_STORE", WITH_SECRET)
    assert subprocess.run(["sh", ROOT / "deployments" / "deploy.sh"], check=False).returncode == 2
    found = texts()
    assert found["stderr"].count(b"error: ") == 4
    assert [name for name, text in found.items() if SECRET.encode() in text] == []


@pytest.mark.parametrize("flow", [*FLOWS.values(), housekeeping], ids=lambda flow: flow.name)
def test_the_server_does_not_take_a_run_with_a_password(flow: Any) -> None:
    schema = parameter_schema(flow).model_dump(exclude_unset=True)
    for root, count in ((WITHOUT, 0), ("s3://bucket/prefix", 0), (WITH_SECRET, 1), ("jlab://host/?token=1a2b", 1)):
        parameters = {"store": root} if flow is housekeeping else {"config": {"store": {"root": root}}}
        if flow.name == "sweep":
            parameters["config"] |= {"grid": [{"seed": [1]}]}
        assert len(list(validate(parameters, schema, raise_on_error=False))) == count, root


def test_parameters_that_went_round_the_server_s_check_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ParameterTypeError) as refused:
        tailor.validate_parameters({"config": {"store": {"root": WITH_SECRET}}})
    assert "vault://ada:***@host/store" in caplog.text
    assert SECRET not in caplog.text + str(refused.value)
