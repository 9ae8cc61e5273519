"""The small run as a process, the stores it works in, and what must hold after any fault."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers import as_toml
from services import Server, Spawn, environment, tailor_here
from tailored_llama.store import ArtifactStore, verify
from tailored_llama.training.state import FILE

EXACT = ("seals", "publishes", "published")  # moments of `killed.py`; the others are seen from outside
PHASES = ("publishes", "works", "begins", "seals", "works", "published")
BOUND = 900  # seconds after which a run counts as hanging


def artifacts(store: Path) -> dict[str, tuple[int, str]]:
    """Each artifact's place (stage/key) → when its manifest was written, and the SHA-256 of its files."""
    return {
        str(path.parent.relative_to(store)): (
            path.stat().st_mtime_ns,
            json.dumps(json.loads(path.read_text())["files"]),
        )
        for path in store.glob("[!.]*/*/manifest.json")
    }


@dataclass(frozen=True)
class Undisturbed:
    """The store of a run that nothing happened to; its places in the order in which they were published."""

    store: Path

    @property
    def places(self) -> list[str]:
        found = artifacts(self.store)
        return sorted(found, key=lambda place: found[place][0])

    def seconds(self, place: str) -> float:
        return float(json.loads((self.store / place / "manifest.json").read_text())["seconds"])

    def copy_before(self, place: str | None, target: Path, link: bool = True) -> Path:
        """A store of all that was published before a place (None: of everything), by hard links where they can be."""
        places = self.places
        for earlier in places[: places.index(place) if place else None]:
            shutil.copytree(self.store / earlier, target / earlier, copy_function=os.link if link else shutil.copy2)
        return target

    def first_of(self, stage: str) -> str:
        return next(place for place in self.places if place.startswith(f"{stage}/"))


@dataclass(frozen=True)
class Moment:
    """When a run is killed: the artifact it is making, the phase of that, and how far into it (0 to 1)."""

    place: str
    phase: str
    share: float

    def __str__(self) -> str:
        return f"{self.place.split('/')[0]}, {self.phase}" + (f" {self.share:.0%}" if self.phase == "works" else "")


def draw_moments(places: list[str], count: int, seed: int = 0) -> list[Moment]:
    """Seeded moments spread over all artifacts of a run, and over all phases of each."""
    draw = random.Random(seed)
    shuffled = draw.sample(places, len(places))
    return [
        Moment(
            shuffled[i % len(places)], PHASES[(i + i // len(places)) % len(PHASES)], round(draw.uniform(0.1, 0.8), 2)
        )
        for i in range(count)
    ]


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail a test whose block has not ended by then."""

    def fail(*_: object) -> None:
        pytest.fail(f"not at its end within {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Runner:
    """Runs one configuration on any store and through any URL of a Prefect API, here or as a process of its own."""

    configuration: dict[str, Any]
    folder: Path
    spawn: Spawn
    server: Server

    @property
    def log(self) -> str:
        return (self.folder / "run.log").read_text(errors="replace")

    def start(
        self,
        store: Path | str,
        kill_at: Moment | None = None,
        url: str | None = None,
        changed: dict[str, str] | None = None,
        **stores: str,
    ) -> subprocess.Popen[bytes]:
        """Start it, and empty its log; it kills itself at an exact moment, where one is given."""
        file = self.folder / "run.toml"
        file.write_text(as_toml(self._on(store, **stores)))
        (self.folder / "run.log").write_bytes(b"")
        command = [sys.executable, "-m", "flows", "tailor", str(file)]
        if "://" in str(store):  # the lease of a claim is minutes
            command = [sys.executable, "-m", "tests.faults.impatient", str(file)]
        if kill_at:
            key = kill_at.place.split("/")[1]
            command = [sys.executable, "-m", "tests.faults.killed", kill_at.phase, key, str(file)]
        home = environment(self.server.home, url or self.server.url)
        return self.spawn(command, self.folder / "run.log", home | (changed or {}))

    def finish(self, store: Path | str, url: str | None = None) -> None:
        """Run it to its end in this process, which spares the seconds in which another one starts."""
        with time_limit(BOUND):
            tailor_here(self._on(store), url or self.server.url)

    def finish_elsewhere(self, store: Path | str, **options: Any) -> None:
        """Run it to its end in a process of its own, which has another environment."""
        assert self.start(store, **options).wait(BOUND) == 0, self.log

    def _on(self, store: Path | str, **stores: str) -> dict[str, Any]:
        """The configuration on a store."""
        return self.configuration | {"store": self.configuration["store"] | {"root": str(store)} | stores}

    def wait_for(self, run: subprocess.Popen[bytes], store: Path, place: str, share: float, seconds: float) -> float:
        """Wait until a run is so far into an artifact, or beyond; returns when it began that, in `time.time()`."""
        key, deadline = place.split("/")[1], time.monotonic() + BOUND

        def has_begun() -> bool:
            return bool(list(store.glob(f".building/{key}.*"))) or (store / place).is_dir()

        while not has_begun():
            assert run.poll() is None or has_begun(), self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.002)
        begun = time.time()
        while time.time() < begun + share * seconds and not (store / place).is_dir():
            time.sleep(0.002)
        return begun


def work_lost(store: Path, place: str, begun: float) -> float:
    """Seconds of a killed stage that have to be done again: since it began, or last kept its state."""
    if (store / place).is_dir():
        return 0.0
    state = store / ".resume" / place.split("/")[1] / FILE
    return time.time() - max(begun, state.stat().st_mtime if state.exists() else 0.0)


def check_nothing_lost(store: Path, before: dict[str, tuple[int, str]], undisturbed: Undisturbed) -> None:
    """What was published before the fault is as it was; all else is as in a run that nothing happened to, and whole.

    The report's bytes are compared by nothing: it says how many seconds each stage took.
    """
    after, whole = artifacts(store), artifacts(undisturbed.store)
    assert {place: after.get(place) for place in before} == before
    assert after.keys() == whole.keys()
    for place, (_, files) in whole.items():
        assert place.startswith("report/") or after[place][1] == files, place
    assert not [problem for _, problem in verify(ArtifactStore(str(store))) if problem]
    assert not list(store.glob(".building/*"))
    assert not list(store.glob(".resume/*"))
