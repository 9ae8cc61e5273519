"""Fixtures: the tiny model and a whole run configuration on it."""

# ruff: noqa: E402
import gc

gc.disable()  # until all tests are collected: there is no garbage yet, and looking for it takes a third of the time

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import own_configuration, save_tiny_llama
from tailored_llama.console import quiet_libraries


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="compare with lm-evaluation-harness on many documents")
    parser.addoption("--vllm", default=".venv-vllm/bin/python", metavar="PYTHON", help="a Python with vLLM")
    faults = parser.getgroup("faults")
    faults.addoption("--kills", type=int, default=12, help="moments at which the flow is killed")
    faults.addoption("--tiny", action="store_true", help="break runs on the tiny model instead of SmolLM2")
    faults.addoption("--faults-out", default="reports/faults", metavar="FOLDER", help="where the table is written")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the second of two processes begin with the flows, as they steal from the end: each server is started once."""
    flows = [item for item in items if item.path.parent.name == "flows"]
    others = [item for item in items if item.path.parent.name != "flows"]
    half = len(items) // 2
    items[:] = others[:half] + flows + others[half:]


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    quiet_libraries()


@pytest.fixture(autouse=True, scope="session")
def _state_of_fixtures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No fixture touches the user's state folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def _state_of_test(_state_of_fixtures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a state folder of its own, as many open the same rows."""
    monkeypatch.setenv("XDG_STATE_HOME", f"{os.environ['XDG_STATE_HOME']}/{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense tiny checkpoint."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "dense")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """Make a new folder below the test's own."""

    def make(name: str) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        return path

    return make


@pytest.fixture
def own_run(tmp_path: Path, tiny: Path) -> dict[str, Any]:
    """A whole run configuration on the tiny model and the user's own benchmark, as plain data."""
    return own_configuration(tmp_path, tiny)
