"""What an executor does when a node fails, on stages that compute nothing."""

import errno
import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from tailored_llama.config import ExecutionConfig, StoreConfig, Work
from tailored_llama.errors import NothingToReport
from tailored_llama.pipeline import Artifact, Graph, IncompleteRun, StoreExecutor
from tailored_llama.pipeline.executor import ALONE, Cancelled, build, execute
from tailored_llama.pipeline.graph import stage
from tailored_llama.pipeline.workers import workers
from tailored_llama.progress import silent
from tailored_llama.store import ArtifactStore, file_lock

made: list[str] = []
kept: list["weakref.ref[Weights]"] = []


@dataclass(frozen=True)
class Settings:
    name: str


class Weights:
    """What takes memory."""


def write(*, read: Path | None = None, settings: Settings, work: Work) -> None:
    made.append(settings.name)
    (work.out / "name").write_text(settings.name)


def refuse(*, settings: Settings, work: Work) -> None:
    weights = Weights()
    kept.append(weakref.ref(weights))
    raise ValueError(settings.name)


@stage("written", 1, lambda: write)
def written(*, settings: Settings, read: Artifact | None = None) -> None: ...


@stage("computed", 1, lambda: write, on_device=True)
def computed(*, settings: Settings) -> None: ...


@stage("refused", 1, lambda: refuse)
def refused(*, settings: Settings) -> None: ...


def summarise(*, of: Sequence[Path], settings: Settings, work: Work) -> None:
    if not of:
        raise NothingToReport("report: got no scores")
    write(settings=settings, work=work)


@stage("summary", 1, lambda: summarise, tolerant=True)
def summary(*, of: Sequence[Artifact], settings: Settings) -> None: ...


@pytest.fixture(params=[1, 2], ids=["one after another", "ahead"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> StoreExecutor:
    made.clear()
    kept.clear()
    return StoreExecutor(StoreConfig(root=str(tmp_path / "store")), ExecutionConfig(processes=request.param))


def test_failures_of_one_name_are_all_told(run: StoreExecutor) -> None:
    failed = run.failures([refused("prune", settings=Settings(of)) for of in ("first", "second", "first")])
    assert {name: str(error) for name, error in failed.items()} == {"prune": "first", "prune (2)": "second"}


def test_what_fails_keeps_no_memory(run: StoreExecutor) -> None:
    assert run.failures(refused("prune", settings=Settings("too large")))
    assert [weights() for weights in kept] == [None]


def test_nothing_more_is_made_for_a_node_whose_check_has_failed(run: StoreExecutor) -> None:
    node = written("prune", settings=Settings("pruned"), read=written("importance", settings=Settings("expensive")))
    graph = Graph(node.after(refused("check ratio", settings=Settings("cannot be reached"))))
    with pytest.raises(IncompleteRun, match="check ratio: cannot be reached") as ended:
        execute(run, graph)
    assert ended.value.failed.keys() == {"check ratio"}
    assert ended.value.report is None
    assert made == ["expensive"] * run.ahead


def test_nothing_is_published_after_an_export_has_failed(run: StoreExecutor, tmp_path: Path) -> None:
    published = list[str]()
    lost = {tmp_path / "lost": refused("export", settings=Settings("no room"))}
    graph = Graph(written("report", settings=Settings("report")), exports=lost, publish=lambda: published.append("all"))
    with pytest.raises(IncompleteRun, match="export: no room") as ended:
        execute(run, graph)
    assert ended.value.report
    assert not published


def test_an_export_without_room_stops_no_other_and_costs_no_report(
    run: StoreExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, published = shutil.copytree, list[str]()

    def copy(source: Any, target: Path, *arguments: Any, **named: Any) -> Any:
        if "full" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return real(source, target, *arguments, **named)

    monkeypatch.setattr(shutil, "copytree", copy)
    exports = {tmp_path / name: written(f"export {name}", settings=Settings(name)) for name in ("full", "a", "full2")}
    graph = Graph(written("report", settings=Settings("report")), (), exports, publish=lambda: published.append("all"))
    with pytest.raises(IncompleteRun, match="No space left on device") as ended:
        execute(run, graph)
    assert ended.value.failed.keys() == {"export full", "export full2"}
    assert ended.value.report
    assert (tmp_path / "a" / "name").read_text() == "a"
    assert not published


def test_a_report_that_fails_beside_something_else_is_named_too(run: StoreExecutor) -> None:
    """Unless it fails because there is nothing left to report."""
    graph = Graph(refused("report", settings=Settings("broken")), failed={"candidate": ValueError("too large")})
    with pytest.raises(IncompleteRun, match=r"candidate: too large; report: broken") as ended:
        execute(run, graph)
    assert ended.value.report is None
    empty = summary("report", of=[refused("score", settings=Settings("lost"))], settings=Settings("report"))
    with pytest.raises(IncompleteRun) as ended:
        execute(run, Graph(empty))
    assert ended.value.failed.keys() == {"score"}


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.write_text("{"), lambda file: file.write_text("B")])
def test_an_exported_folder_with_lost_or_changed_files_is_mended_by_the_next_run(
    run: StoreExecutor, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    target = tmp_path / "model"
    graph = Graph(written("report", settings=Settings("report")), (), {target: written("ship", settings=Settings("A"))})
    execute(run, graph)
    inode = target.stat().st_ino
    execute(run, graph)
    assert target.stat().st_ino == inode  # whole, so it is left as it is
    harm(target / "name")
    execute(run, graph)
    assert (target / "name").read_text() == "A"


@pytest.mark.parametrize("held", ["the thread's turn", "a worker", "the artifact's lock"])
def test_a_cancelled_run_waits_for_nothing_and_builds_nothing(tmp_path: Path, held: str) -> None:
    made.clear()
    artifacts, execution, cancelled, looked = (
        ArtifactStore(str(tmp_path)),
        ExecutionConfig(processes=2),
        Event(),
        Event(),
    )
    node = (computed if held == "a worker" else written)("prune", settings=Settings("cancelled"))

    def check() -> None:
        looked.set()
        if cancelled.is_set():
            raise Cancelled("the run was cancelled")

    def wait() -> None:
        try:
            build(node, artifacts, str(tmp_path), execution, silent, check)
        except Cancelled:
            ended.set()

    ended, waiting = Event(), Thread(target=wait, daemon=True)
    holders = {"the thread's turn": ALONE, "a worker": workers(2).held(True, lambda: None)}
    with holders.get(held) or file_lock(artifacts.lock(node.key)):
        waiting.start()
        assert looked.wait(20)
        cancelled.set()
        assert ended.wait(20)  # while it is held
    assert not made
    assert artifacts.find(node.stage.name, node.key) is None
