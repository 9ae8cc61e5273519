"""What lies in a store, which reports used it, and what may go.

A report keeps all it was made of: its manifest names its inputs, theirs name theirs. Ages count from the last time an
artifact was found or published, since what a nightly run reads may have been made long ago; behind a URL, whose files
do not tell when they were read, from when it was published or last used on this machine, whichever is later.
"""

from __future__ import annotations

import heapq
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tailored_llama import remote
from tailored_llama.artifacts import ArtifactStore
from tailored_llama.errors import InputError
from tailored_llama.files import file_lock
from tailored_llama.manifests import MANIFEST, Manifest, check_identity, parse_manifest

REPORTS = ("report", "sweep", "transfer", "prompt-study")  # what a run is for: no stage reads them
FINISHED = "tailored"  # finished models, which no report names: kept as long as all they were made of is
HALF_DONE = 6 * 3600.0  # seconds after which what nobody works on is a leftover
STATES = 7 * 86400.0  # the same for states of trainings, which a run of next week may still take up

Name = tuple[str, str]  # stage and key


@dataclass(frozen=True)
class Entry:
    """One artifact, or what is left of one; files are counted and measured, not hashed."""

    stage: str
    key: str
    manifest: Manifest | None
    problem: str | None
    files: tuple[str, ...]
    size: int  # bytes
    used: float  # seconds since 1970

    @property
    def name(self) -> Name:
        return self.stage, self.key

    @property
    def inputs(self) -> set[Name]:
        return {(ref.stage, ref.key) for ref in self.manifest.inputs.values()} if self.manifest else set()


def survey(store: ArtifactStore) -> list[Entry]:
    """All artifacts of a store, by stage and key; behind a URL those over there, not the working copy."""
    return sorted(_far(store) if store.remote else _near(store), key=lambda entry: entry.name)


def used_by(entries: Sequence[Entry]) -> dict[Name, list[Entry]]:
    """For every artifact the reports that used it, themselves included, the newest first."""
    by = {entry.name: entry for entry in entries}
    found: dict[Name, list[Entry]] = {name: [] for name in by}
    for report in _reports(entries):
        for name in _reach(by, [report.name]):
            found[name].append(report)
    return found


def removable(
    entries: Sequence[Entry],
    older_than: float,
    keep_under: int | None = None,
    keep_reports: int | None = None,
    now: float | None = None,
) -> list[Entry]:
    """What may go, in the order in which it should: whatever stays finds all it was made of.

    Args:
        entries: the whole store.
        older_than: seconds; what was used since stays, and all it was made of.
        keep_under: bytes; the oldest go until the store is at most that large; absent: all that may go.
        keep_reports: how many of the newest reports stay, with all they were made of; absent: every one.
        now: seconds since 1970; absent: now.

    Raises:
        InputError: something that stays has a manifest that cannot be read, and nobody knows what it used.
    """
    by = {entry.name: entry for entry in entries}
    now = time.time() if now is None else now
    young = [entry.name for entry in entries if now - entry.used < older_than and not _torn(entry)]
    kept = _reach(by, [entry.name for entry in _reports(entries)[:keep_reports]] + young)
    kept |= {e.name for e in entries if e.stage == FINISHED and e.inputs and e.inputs <= kept}
    if torn := [by[name] for name in sorted(kept) if _torn(by[name])]:
        raise InputError(
            f"{torn[0].stage}/{torn[0].key}: {torn[0].problem}, so what it used is not known; allowed: a store whose "
            "reports are whole (repeat that run, or remove the folder)"
        )
    needs = Counter(name for entry in entries for name in entry.inputs)
    free = [(by[name].used, name) for name in by.keys() - kept if not needs[name]]
    heapq.heapify(free)
    total, gone = sum(entry.size for entry in entries), []
    while free and (keep_under is None or total > keep_under):
        _, name = heapq.heappop(free)
        gone.append(by[name])
        total -= by[name].size
        for inner in by[name].inputs:
            needs[inner] -= 1
            if not needs[inner] and inner in by and inner not in kept:
                heapq.heappush(free, (by[inner].used, inner))
    return gone


def remove(store: ArtifactStore, entry: Entry) -> bool:
    """Remove an artifact, behind the URL first; False where it is being built, or was used since the survey."""
    with file_lock(store.lock(entry.key), wait=False) as held:
        if not held or _last_found(store, *entry.name) > entry.used:
            return False
        if store.remote:
            order = sorted(entry.files, key=lambda name: name != MANIFEST)  # what loses its manifest is no artifact
            remote.remove(store.remote, "/".join(entry.name), order)
        folder = store.folder(*entry.name)
        if folder.is_symlink() or folder.exists():
            store.discard(*entry.name)
        store.lock(entry.key).unlink(missing_ok=True)
    return True


def leftovers(store: ArtifactStore, now: float | None = None) -> list[tuple[Path, int]]:
    """What dead processes left in a store's local folder, and its bytes: half-done work, states, lock files."""
    now, found = time.time() if now is None else now, []
    for place, age in ((".building", HALF_DONE), (".resume", STATES), (".locks", HALF_DONE)):
        for path in sorted((store.local / place).glob("*")):
            size, changed = _extent(path)
            if now - changed >= age:
                found.append((path, size))
    return found


def sweep(store: ArtifactStore, path: Path) -> bool:
    """Remove a leftover; False where a process is at work on it after all."""
    lock = store.lock(path.name.partition(".")[0])
    with file_lock(lock, wait=False) as held:
        if not held:
            return False
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
    return True


def verify(store: ArtifactStore) -> Iterator[tuple[str, str | None]]:
    """Hash every file of every artifact: its place, and what is wrong with it, if anything.

    Behind a URL each is fetched into a temporary folder; the working copy is not looked at.
    """
    if not store.remote:
        for _, folder, problem in store.list():
            yield str(folder), problem
        return
    for entry in survey(store):
        problem = entry.problem
        if not problem:
            with tempfile.TemporaryDirectory() as scratch:
                problem = store.fetch(entry.stage, entry.key, Path(scratch))
        yield f"{store.root.rstrip('/')}/{entry.stage}/{entry.key}", problem


def _near(store: ArtifactStore) -> Iterator[Entry]:
    for folder in store.local.glob("[!.]*/*"):
        stage, key = folder.parent.name, folder.name
        if _is_place(stage, key) and (folder.is_dir() or folder.is_symlink()):
            sizes = {str(path.relative_to(folder)): path.lstat().st_size for path in _files(folder)}
            manifest = folder / MANIFEST
            content = manifest.read_bytes() if manifest.is_file() else None
            yield _entry(stage, key, content, sizes, _last_found(store, stage, key))


def _far(store: ArtifactStore) -> Iterator[Entry]:
    assert store.remote
    found: dict[Name, dict[str, tuple[int, float]]] = {}
    for path, facts in remote.files(store.remote).items():
        stage, _, rest = path.partition("/")
        key, _, name = rest.partition("/")
        if name and _is_place(stage, key):
            found.setdefault((stage, key), {})[name] = facts
    manifests = remote.read(
        store.remote, [f"{s}/{k}/{MANIFEST}" for (s, k), names in found.items() if MANIFEST in names]
    )
    for (stage, key), names in found.items():
        written = max(moment for _, moment in names.values())
        yield _entry(
            stage,
            key,
            manifests.get(f"{stage}/{key}/{MANIFEST}"),
            {name: size for name, (size, _) in names.items()},
            max(written, _last_found(store, stage, key)),
        )


def _entry(stage: str, key: str, content: bytes | None, sizes: Mapping[str, int], used: float) -> Entry:
    manifest: Manifest | None = None
    problem: str | None = f"{MANIFEST} is missing"
    if content is not None:
        try:
            found = parse_manifest(content, f"{stage}/{key}/{MANIFEST}")
        except InputError as error:
            problem = str(error)
        else:
            problem = check_identity(found, stage, key)
            if not problem:
                manifest, problem = found, _size_problem(found, sizes)
    return Entry(stage, key, manifest, problem, tuple(sizes), sum(sizes.values()), used)


def _size_problem(manifest: Manifest, sizes: Mapping[str, int]) -> str | None:
    for name, entry in manifest.files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != entry["size"]:
            return f"{name} has {sizes[name]} bytes, expected {entry['size']}"
    return None


def _torn(entry: Entry) -> bool:
    """Whether there is a manifest that cannot be read; without one it is no artifact, and nothing refers to it."""
    return entry.manifest is None and MANIFEST in entry.files


def _is_place(stage: str, key: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", stage) and re.fullmatch(r"[0-9a-f]{64}", key))


def _reports(entries: Iterable[Entry]) -> list[Entry]:
    found = (entry for entry in entries if entry.stage in REPORTS and MANIFEST in entry.files)
    return sorted(found, key=lambda entry: -entry.used)


def _reach(by: Mapping[Name, Entry], roots: Iterable[Name]) -> set[Name]:
    """The roots and all that they were made of, as far as it is there."""
    found: set[Name] = set()
    new = set(roots)
    while new := (new & by.keys()) - found:
        found |= new
        new = {name for each in new for name in by[each].inputs}
    return found


def _last_found(store: ArtifactStore, stage: str, key: str) -> float:
    try:
        return store.folder(stage, key).lstat().st_mtime
    except OSError:
        return 0.0


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        yield from (Path(place, name) for name in names)
        yield from (Path(place, name) for name in folders if Path(place, name).is_symlink())


def _extent(path: Path) -> tuple[int, float]:
    """Bytes of a file or folder, and when anything in it was last changed; one that goes meanwhile is of now."""
    try:
        stats = [path.lstat(), *(file.lstat() for file in _files(path))]
    except OSError:
        return 0, time.time()
    return sum(s.st_size for s in stats[1:]) or stats[0].st_size * path.is_file(), max(s.st_mtime for s in stats)
