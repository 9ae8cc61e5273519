"""Every step of every operation of the store fails, kills its process, or is where another machine comes in.

After each, nothing is lost, nothing is published in part, nothing is computed twice but what was in hand, and the next
runs end with the same bytes on both machines.
"""

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

import pytest

from crashes import READS, Clock, ObjectStore, Process, broken, files_below, record_disk, run
from tailored_llama.errors import InputError
from tailored_llama.store import (
    FINISHED,
    ArtifactRef,
    ArtifactStore,
    artifact_key,
    leftovers,
    place,
    published_file,
    publishing,
    removable,
    remove_artifacts,
    remove_leftover,
    survey,
)
from tailored_llama.store.remote import Remote

KEY = artifact_key("stage", 1, {}, {})
DAY = 86400.0

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # threads die, too


@dataclass
class World:
    """Machines that share a store: a folder, or what is behind a URL, which is a folder again or an object store."""

    folder: Path
    kind: str
    objects: ObjectStore = field(default_factory=ObjectStore)
    clocks: dict[str, Clock] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)  # by which machines

    def copy(self) -> Self:
        """The same machines, whose folder has been copied."""
        objects, clocks = ObjectStore(), {machine: Clock() for machine in self.clocks}
        objects.objects |= self.objects.objects
        for machine, clock in clocks.items():
            clock.time = self.clocks[machine].time
        return World(self.folder, self.kind, objects, clocks, list(self.computed))

    def clock(self, machine: str) -> Clock:
        return self.clocks.setdefault(machine, Clock())

    def store(self, machine: str) -> ArtifactStore:
        """The store as a new process of a machine sees it."""
        lease = self.clock(machine).lease
        if self.kind == "folder":
            return ArtifactStore(str(self.folder / "shared"))
        store = ArtifactStore(f"file://{self.folder}/shared", str(self.folder / machine), lease)
        if self.kind == "objects":
            store.remote = Remote("s3://bucket", self.objects, "bucket")
        return store

    def build(
        self,
        machine: str,
        work: Callable[[], object] = lambda: None,
        stage: str = "stage",
        inputs: dict[str, ArtifactRef] | None = None,
        store: ArtifactStore | None = None,
    ) -> ArtifactRef:
        """Compute two files, whose bytes are never the same twice, and do `work` after that."""

        def function(out: Path) -> None:
            self.computed.append(machine)
            (out / "sub").mkdir()
            for name in ("a.bin", "sub/b.bin"):
                (out / name).write_text(f"{name}, as {machine} computed it, the {len(self.computed)}th time")
                os.utime(out / name, (0, 0))  # long ago, so that it need not be hashed again
            work()

        return (store or self.store(machine)).build(stage, 1, {}, inputs or {}, function)[0]

    def build_without_publishing(self, machine: str) -> ArtifactRef:
        """Build in the working copy alone, as where the server then fails."""
        return self.build(machine, store=ArtifactStore(str(self.store(machine).local)))

    def die_computing(self, machine: str, stage: str = "stage") -> None:
        process = Process("dies before")

        def die() -> None:
            process.at = len(process.steps) + 1

        run(process, lambda: self.build(machine, die, stage))
        assert process.dead

    def collect_garbage(self, machine: str, older_than: float = DAY) -> None:
        """As the command does, but eight days from now."""
        store, now = self.store(machine), time.time() + 8 * DAY
        for name, _ in leftovers(store, now):
            remove_leftover(store, name)
        remove_artifacts(store, removable(survey(store), older_than, now=now))

    def shared(self) -> dict[str, bytes]:
        """All files that the machines share."""
        if self.kind == "objects":
            return {name.removeprefix("bucket/"): content for name, (content, _) in self.objects.objects.items()}
        return files_below(self.folder / "shared")

    def published(self, but: str = "") -> dict[str, bytes]:
        """The files of all published artifacts but those of a stage."""
        files = self.shared()
        places = {name: "/".join(name.split("/")[:2]) for name in files if name[0] != "." and name.split("/")[0] != but}
        return {name: files[name] for name, place in places.items() if f"{place}/manifest.json" in files}

    def damage(self) -> None:
        name = f"stage/{KEY}/a.bin"
        if self.kind == "objects":
            self.objects.objects[f"bucket/{name}"] = b"damaged", 0.0
        else:
            (self.folder / "shared" / name).write_bytes(b"damaged")

    def local_folders(self) -> list[Path]:
        """The stores' local folders; working copies, if there is a URL."""
        return [self.folder / "shared"] if self.kind == "folder" else list(self.folder.glob("[!s]*/*"))

    def broken(self) -> set[str]:
        """Whatever looks published and is not whole, or lacks what it was made of."""
        files = self.shared()
        found = {f"shared/{artifact}" for artifact in broken(files)}
        for name in files:
            if name.endswith("/manifest.json") and name[0] != ".":
                inputs = json.loads(files[name])["inputs"].values()
                found |= {f"of {name}" for ref in inputs if f"{ref['stage']}/{ref['key']}/manifest.json" not in files}
        for local in self.local_folders():
            found |= {f"{local}/{artifact}" for artifact in broken(files_below(local))}
            found |= {str(path) for path in local.glob("[!.]*/*") if not (path / "manifest.json").is_file()}
        return found

    def remains(self) -> list[str]:
        """Claims, unfinished work and training states."""
        remains = [str(path) for local in self.local_folders() for path in local.glob(".[br]*/*")]
        return remains + [name for name in self.shared() if name.startswith(".claims")]


def be_overtaken(world: World) -> None:
    other = Process()
    world.build("one", lambda: run(other, lambda: world.build("two")))


def renew(world: World) -> None:
    world.build("one", lambda: [world.clock("one").let_pass(31) for _ in range(3)])


def adopt(world: World) -> None:
    two = world.store("two").find("stage", KEY)
    assert two
    world.store("one").open(two)


def make_garbage(world: World) -> None:
    """A report and what it was made of, which stay. All else goes, what was made of it first."""
    dense = world.build("two", stage="dense")
    world.build("two", stage="report", inputs={"dense": dense})
    world.build("one", inputs={"source": world.build("one")})
    if world.kind != "folder":
        world.die_computing("three", "other")
    local = world.store("one").local
    for name in (f".building/{'a' * 64}.12345678", f".resume/{'b' * 64}"):
        (local / name).mkdir(parents=True)
        (local / name / "half.bin").write_bytes(b"half")


@dataclass(frozen=True)
class Operation:
    """What machine `one` does, in a world that was prepared for it."""

    act: Callable[[World], object]
    prepare: Callable[[World], object] = lambda world: None
    kinds: tuple[str, ...] = ("objects",)
    computes: int = 1  # how often, if nothing happens
    loses: str = ""  # the stage whose artifact may go


def build(world: World) -> None:
    world.build("one")


ALL = ("folder", "file", "objects")
OPERATIONS = {
    "build": Operation(build, kinds=ALL),
    "build and renew the claim": Operation(renew),
    "build what another one publishes first": Operation(be_overtaken),
    "build what is published": Operation(build, lambda world: world.build("two"), ALL, 0),
    "build what is damaged": Operation(
        build, lambda world: [world.build("three"), world.damage()], ("folder", "objects"), loses="stage"
    ),
    "take over from a dead machine": Operation(build, lambda world: world.die_computing("two")),
    "take over from a dead process": Operation(
        build, lambda world: world.die_computing("one"), ("folder", "objects"), 2
    ),
    "find": Operation(
        lambda world: world.store("one").find("stage", KEY), lambda world: world.build("two"), computes=0
    ),
    "push": Operation(build, lambda world: world.build_without_publishing("one")),
    "adopt": Operation(adopt, lambda world: [world.build_without_publishing("one"), world.build("two")]),
    "collect garbage": Operation(lambda world: world.collect_garbage("one"), make_garbage, ALL, 2, "stage"),
}


@pytest.fixture
def new_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Operation], World]]:
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a world lasts milliseconds

    prepared: list[World] = []

    def make(kind: str, operation: Operation) -> World:
        if not prepared:
            folder.mkdir()
            prepared.append(World(folder, kind))
            operation.prepare(prepared[0])
            folder.rename(before)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        return prepared[0].copy()

    with tempfile.TemporaryDirectory(dir=in_memory) as root:
        folder, before = Path(root) / "world", Path(root) / "prepared"
        record_disk(Path(root), monkeypatch)
        yield make


def settle(world: World, machines: tuple[str, str]) -> None:
    """Let the machines build, one after the other: all is as if nothing had happened."""
    computed, local = len(world.computed), world.store(machines[0]).local
    shared = f"stage/{KEY}/manifest.json" in world.shared() and not broken(world.shared())
    is_whole = shared or ((local / "stage" / KEY).is_dir() and not broken(files_below(local)))
    waited = sum(clock.time for clock in world.clocks.values())
    first, second = (world.build(machine) for machine in machines)
    assert not shared or waited == sum(clock.time for clock in world.clocks.values())
    assert first == second
    assert len(world.computed) == computed + (not is_whole)
    folders = [files_below(world.store(machine).folder("stage", KEY)) for machine in machines]
    assert folders[0] == folders[1]
    assert not world.broken()
    if world.remains():
        for machine in list(world.clocks):
            world.collect_garbage(machine, older_than=30 * DAY)
    assert not world.remains()
    assert f"stage/{KEY}/manifest.json" in world.published()


ORDERS = (("one", "two"), ("two", "one"))
CASES = [(name, kind) for name, operation in OPERATIONS.items() for kind in operation.kinds]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_step_that_fails(name: str, kind: str, new_world: Callable[[str, Operation], World]) -> None:
    operation = OPERATIONS[name]
    world = new_world(kind, operation)
    undisturbed = run(Process(), partial(operation.act, world))
    assert world.computed.count("one") == operation.computes
    for number, step in enumerate(undisturbed.steps, start=1):
        world = new_world(kind, operation)
        published, damaged, process = world.published(operation.loses), world.broken(), Process("fails", number)
        run(process, partial(operation.act, world))
        assert len(process.steps) >= number, step
        assert world.published().items() >= published.items(), step
        assert world.broken() <= damaged, step
        settle(world, ORDERS[0])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_process_that_dies(name: str, kind: str, new_world: Callable[[str, Operation], World]) -> None:
    """After a step that does not write, all is as before the next one. Before one that only reads, too."""
    operation = OPERATIONS[name]
    undisturbed = run(Process(), partial(operation.act, new_world(kind, operation)))
    for number, (call, about) in enumerate(undisturbed.steps, start=1):
        last = number == len(undisturbed.steps)
        faults = [] if call in READS else ["dies before"]
        for fault in faults + ["dies after"] * (call == "write" or last):
            for machines in ORDERS:
                world = new_world(kind, operation)
                published, damaged, process = world.published(operation.loses), world.broken(), Process(fault, number)
                run(process, partial(operation.act, world))
                assert process.dead, (call, about)
                assert world.published().items() >= published.items(), (call, about)
                assert world.broken() <= damaged, (call, about)
                settle(world, machines)


@pytest.mark.parametrize("outlasts", [False, True], ids=["comes in", "takes over from a stalled one"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_another_machine(name: str, outlasts: bool, new_world: Callable[[str, Operation], World]) -> None:
    """It builds, but goes away where it would have to wait; or waits for longer than the lease of one that stalls.

    docs/reference/store.md names what a stalled machine may then damage.
    """
    operation = OPERATIONS[name]
    undisturbed = run(Process(), partial(operation.act, new_world("objects", operation)))
    for number, (call, about) in enumerate(undisturbed.steps, start=1):
        if about.split("/")[0] != "bucket":
            continue  # nobody else sees it
        damages = outlasts and call in ("put_file", "rm_file")
        for machines in ORDERS[: 1 if damages else 2]:
            world = new_world("objects", operation)
            published: dict[str, bytes] = {}
            damaged, other = world.broken(), Process()

            def come_in(world: World = world, other: Process = other, published: dict[str, bytes] = published) -> None:
                world.clock("two").patience = float("inf") if outlasts else 0.0
                run(other, lambda: world.build("two"))
                world.clock("two").patience = float("inf")
                if not other.failure:
                    published |= world.published(but="stage" if name == "collect garbage" else "")

            process = Process("meets", number, come_in)
            run(process, partial(operation.act, world))
            assert process.failure is None, (call, about)
            assert other.steps
            assert other.failure is None or not outlasts, (call, about)
            if not damages:
                assert world.published().items() >= published.items(), (call, about)
                assert world.broken() <= damaged, (call, about)
            settle(world, machines)


@dataclass(frozen=True)
class Placed:
    """A folder in which an artifact is placed, where another one may stand."""

    old: Path
    new: Path
    folder: Path
    replaces: bool
    exchanges: bool  # the file system can exchange two folders

    @property
    def target(self) -> Path:
        return self.folder / "model"

    def prepare(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        if self.replaces:
            shutil.copytree(self.old, self.target)

    def place(self, artifact: Path) -> None:
        place(artifact, self.target, "store.export", "an exported model", [FINISHED])

    def stands(self) -> Path | None:
        """The artifact that stands at the target, whole; None if nothing does."""
        files = files_below(self.target)
        return next((artifact for artifact in (self.old, self.new) if files == files_below(artifact)), None)

    def settle(self) -> None:
        """A later call completes, and leaves nothing beside what it has placed."""
        self.place(self.new)
        assert self.stands() == self.new
        assert list(self.folder.iterdir()) == [self.target]


@pytest.fixture(params=["exchanged", "renamed", "new"])
def placed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Placed]:
    def write(out: Path, name: str) -> None:
        (out / "sub").mkdir()
        for file in (out / "weights.bin", out / "sub" / name):
            file.write_text(name)

    def refuse(one: Path, other: Path) -> None:
        raise OSError

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as root:
        store = ArtifactStore(f"{root}/store")
        refs = [store.build(FINISHED, 1, {"of": name}, {}, partial(write, name=name))[0] for name in ("old", "new")]
        kind, folders = request.param, [store.open(ref) for ref in refs]
        if kind == "renamed":
            monkeypatch.setattr(publishing, "_exchange", refuse)
        record_disk(Path(root), monkeypatch)
        yield Placed(*folders, Path(root) / "models", kind != "new", kind == "exchanged")


def steps_of(placed: Placed) -> list[tuple[str, str]]:
    placed.prepare()
    steps = run(Process(), lambda: placed.place(placed.new)).steps
    assert placed.stands() == placed.new
    assert list(placed.folder.iterdir()) == [placed.target]
    return steps


def test_a_step_of_placing_that_fails(placed: Placed) -> None:
    for number, step in enumerate(steps_of(placed), start=1):
        placed.prepare()
        process = run(Process("fails", number), lambda: placed.place(placed.new))
        assert process.failure is None or isinstance(process.failure, InputError), step
        assert placed.stands() in (placed.new, placed.old if placed.replaces else None), step
        assert process.failure or placed.stands() == placed.new, step
        placed.settle()


def test_a_process_that_dies_placing(placed: Placed) -> None:
    """Where folders cannot be exchanged, the old copy may be beside its place, but is found."""
    gone = 0
    for number, step in enumerate(steps_of(placed), start=1):
        for fault in ("dies before", "dies after"):
            placed.prepare()
            assert run(Process(fault, number), lambda: placed.place(placed.new)).dead
            gone += placed.replaces and not placed.target.exists()
            stands = placed.old if placed.replaces else None
            assert placed.stands() in (placed.new, stands) or not placed.exchanges, step
            content = published_file(str(placed.target), "weights.bin")
            assert content in (b"new", b"old" if placed.replaces else None), step
            placed.settle()
    assert gone == (0 if placed.exchanges or not placed.replaces else 2)


def test_two_processes_that_place_at_once(placed: Placed) -> None:
    for number, step in enumerate(steps_of(placed), start=1):
        placed.prepare()
        other = threading.Thread(target=placed.place, args=[placed.old], daemon=True)  # which no process's steps are of
        process = run(Process("meets", number, other.start), lambda: placed.place(placed.new))
        other.join(60)
        assert not other.is_alive(), step
        assert process.failure is None, step
        assert placed.stands(), step
        assert list(placed.folder.iterdir()) == [placed.target], step
