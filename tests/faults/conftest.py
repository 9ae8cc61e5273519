"""The small run, a server for it, and the table of what it survived."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from faults import ledger
from faults.ledger import Trial
from faults.runs import Runner, Undisturbed
from helpers import write_own_benchmark
from services import Server, Spawn, children, tailor_here
from tailored_llama.config import StoreConfig
from tailored_llama.store import ArtifactStore, verify

TRIALS = pytest.StashKey[list[Trial]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TRIALS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kill_number" in metafunc.fixturenames:
        metafunc.parametrize("kill_number", range(metafunc.config.getoption("kills")))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if trials := config.stash[TRIALS]:
        folder = Path(config.getoption("faults_out"))
        ledger.write(trials, folder)
        terminalreporter.section("faults")
        terminalreporter.write_line(ledger.table(trials))
        terminalreporter.write_line(f"every trial: {folder / 'faults.parquet'}")


@pytest.fixture
def trial(request: pytest.FixtureRequest) -> Callable[[str, str], AbstractContextManager[Trial]]:
    """A block that enters a fault into the table; it counts as survived where the block comes to its end."""

    @contextlib.contextmanager
    def enter(fault: str, moment: str) -> Iterator[Trial]:
        made = Trial(fault, moment)
        request.config.stash[TRIALS].append(made)
        begun = time.monotonic()
        yield made
        made.survived, made.seconds = True, round(time.monotonic() - begun, 1)

    return enter


@pytest.fixture(scope="session")
def configuration(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run of a minute or so on SmolLM2-135M; or, with --tiny, of a second or so on the tiny model."""
    run = {"pruning": {"ratios": [0.2]}, "execution": {"device": "cpu", "keep_state_every": 1}}
    if not request.config.getoption("tiny"):
        return run | {
            "benchmarks": [{"name": "arc_easy"}],
            "model": {"source": "smollm2-135m-instruct"},
            "calibration": {"source": "boolq", "samples": 8, "tokens": 64},
            "tuning": {"shots": 16, "held_out": 8, "epochs": 2},
            "scoring": {"limit": 24},
            "perplexity": {"source": "boolq", "window": 256, "tokens": 1024},
            "store": {"downloads": str(Path(StoreConfig().downloads).expanduser())},
        }
    data = tmp_path_factory.mktemp("data")
    text = data / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return run | {
        "benchmarks": [write_own_benchmark(data)],
        "model": {"source": str(request.getfixturevalue("tiny")), "dtype": "float32"},
        "calibration": {"source": str(text), "samples": 4, "tokens": 16},
        "pruning": {"ratios": [0.2], "min_channels": 4},
        "tuning": {"shots": 8, "held_out": 4, "epochs": 50, "patience": 50, "learning_rate": 1e-2},
        "perplexity": {"source": str(text), "window": 32, "tokens": 128},
        "store": {"downloads": str(data / "downloads")},
    }


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that do not harm it."""
    with children() as spawn:
        server = Server(spawn, tmp_path_factory.mktemp("server") / "prefect")
        server.start()
        yield server


@pytest.fixture(scope="session")
def undisturbed(
    configuration: dict[str, Any], shared_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Undisturbed]:
    folder = tmp_path_factory.mktemp("undisturbed")
    tailor_here(configuration | {"store": configuration["store"] | {"root": str(folder / "store")}}, shared_server.url)
    yield Undisturbed(folder / "store")
    found = list(verify(ArtifactStore(str(folder / "store"))))
    shutil.rmtree(folder / "store")
    assert not [problem for _, problem in found if problem]  # its files are linked into every test's store


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    with children() as start:
        yield start


@pytest.fixture
def runner(configuration: dict[str, Any], tmp_path: Path, spawn: Spawn, shared_server: Server) -> Runner:
    return Runner(configuration, tmp_path, spawn, shared_server)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """A folder for a store, removed at once: on the real model each is a gigabyte."""
    yield tmp_path / "store"
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
