"""Store housekeeping: what is in a store, which reports used it, and what may be removed.

A report keeps everything it was made of: its manifest names its inputs, and theirs name their own. Ages count from the
last time an artifact was found or published, because a nightly run may read what was made long ago. Files behind a URL
do not record reads; their ages count from publishing or the last use on this machine, whichever is later.
"""

import heapq
import os
import re
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tailored_llama.errors import InputError
from tailored_llama.store import manifests, remote
from tailored_llama.store.artifacts import ArtifactStore
from tailored_llama.store.claims import CLAIMS, claimed
from tailored_llama.store.files import file_lock, raise_unless_gone
from tailored_llama.store.manifests import FINISHED, GGUF, MANIFEST, Manifest
from tailored_llama.store.remote import Remote

REPORTS = ("report", "sweep", "smallest")  # final results: no stage reads them
FORMER = ("transfer", "prompt-study")  # reports that older versions wrote; they are kept as any other
HALF_DONE = 6 * 3600.0  # seconds after which unfinished work that nobody holds is a leftover
STATES = 7 * 86400.0  # the same for training states, which a run days later may resume
_ARTIFACT = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)/([0-9a-f]{64})(?:/(.+))?", re.DOTALL)  # stage, key, a file's name

Name = tuple[str, str]  # stage and key


@dataclass(frozen=True)
class Entry:
    """One artifact, perhaps damaged; its files are listed and sized, not hashed."""

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

    @property
    def is_unreadable(self) -> bool:
        """Whether the manifest exists but cannot be read; without one it is no artifact, and nothing refers to it."""
        return self.manifest is None and MANIFEST in self.files


def survey(store: ArtifactStore) -> list[Entry]:
    """All artifacts of a store, by stage and key; for a URL the remote ones, not the working copy."""
    entries = _remote_entries(store, store.remote) if store.remote else _local_entries(store)
    return sorted(entries, key=lambda entry: entry.name)


def verify(store: ArtifactStore) -> Iterator[tuple[str, str | None]]:
    """Hash every file of every artifact, those of a URL in a temporary folder; yield its location and its problem."""
    for entry in survey(store):
        if not store.remote:
            yield str(store.folder(*entry.name)), store.problem(*entry.name, trust=False)
            continue
        manifest = remote.read(store.remote, f"{entry.stage}/{entry.key}/{MANIFEST}") or b""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "artifact")
            problem = entry.problem or remote.fetch(store.remote, *entry.name, manifest, folder)[0]
        yield f"{store.root.rstrip('/')}/{entry.stage}/{entry.key}", problem


def _local_entries(store: ArtifactStore) -> Iterator[Entry]:
    for folder in store.local.glob("[!.]*/*"):
        stage, key = folder.parent.name, folder.name
        if _ARTIFACT.fullmatch(f"{stage}/{key}") and (folder.is_dir() or folder.is_symlink()):
            sizes = {str(path.relative_to(folder)): path.lstat().st_size for path in _files_of(folder)}
            manifest = folder / MANIFEST
            content = manifest.read_bytes() if manifest.is_file() else None
            yield _entry(stage, key, content, sizes, _last_found(store, stage, key))


def _remote_entries(store: ArtifactStore, at: Remote) -> Iterator[Entry]:
    artifacts: dict[Name, dict[str, tuple[int, float]]] = defaultdict(dict)
    for path, size_and_time in remote.files(at).items():
        if (match := _ARTIFACT.fullmatch(path)) and match[3]:
            artifacts[match[1], match[2]][match[3]] = size_and_time
    paths = [f"{stage}/{key}/{MANIFEST}" for (stage, key), files in artifacts.items() if MANIFEST in files]
    contents = remote.read_all(at, paths)
    for (stage, key), files in artifacts.items():
        sizes = {name: size for name, (size, _) in files.items()}
        used = max(_last_found(store, stage, key), *(written for _, written in files.values()))
        yield _entry(stage, key, contents.get(f"{stage}/{key}/{MANIFEST}"), sizes, used)


def _entry(stage: str, key: str, content: bytes | None, sizes: Mapping[str, int], used: float) -> Entry:
    manifest: Manifest | None = None
    problem: str | None = None
    try:
        if content is None:
            raise InputError(f"{MANIFEST} is missing")
        parsed = manifests.parse_manifest(content, f"{stage}/{key}/{MANIFEST}")
        manifests.check_identity(parsed, stage, key)
        manifest = parsed
        manifests.check_sizes(manifest, sizes)
    except InputError as error:
        problem = str(error)
    return Entry(stage, key, manifest, problem, tuple(sizes), sum(sizes.values()), used)


def reports_using(entries: Sequence[Entry]) -> dict[Name, list[Entry]]:
    """For every artifact, the reports that used it, newest first; a report uses itself."""
    by_name = {entry.name: entry for entry in entries}
    reports: dict[Name, list[Entry]] = {name: [] for name in by_name}
    for report in _reports(entries):
        for name in _reach(by_name, [report.name]):
            reports[name].append(report)
    return reports


def removable(
    entries: Sequence[Entry],
    older_than: float,
    keep_under: int | None = None,
    keep_reports: int | None = None,
    now: float | None = None,
) -> list[Entry]:
    """Artifacts of a whole store that may be removed, in the order of removal: what stays keeps all it was made of.

    Those used less than `older_than` seconds ago stay, and so do the newest `keep_reports` reports (absent: all). The
    oldest go first, until the store has at most `keep_under` bytes (absent: all of them go).

    Raises:
        InputError: the manifest of an artifact that stays is unreadable, so its inputs are unknown.
    """
    by_name = {entry.name: entry for entry in entries}
    now = time.time() if now is None else now
    young = [entry.name for entry in entries if now - entry.used < older_than and not entry.is_unreadable]
    kept = _reach(by_name, [entry.name for entry in _reports(entries)[:keep_reports]] + young)
    for stage in (FINISHED, GGUF):  # the second is made from the first
        kept |= {e.name for e in entries if e.stage == stage and e.inputs and e.inputs <= kept}
    if unreadable := sorted(name for name in kept if by_name[name].is_unreadable):
        first = by_name[unreadable[0]]
        raise InputError(
            f"{first.stage}/{first.key}: {first.problem}, so what it used is not known; allowed: a store whose "
            "reports are whole (repeat that run, or remove the folder)"
        )
    needs = Counter(name for entry in entries for name in entry.inputs)  # by how many artifacts
    free = [(by_name[name].used, name) for name in by_name.keys() - kept if not needs[name]]
    heapq.heapify(free)
    total, gone = sum(entry.size for entry in entries), []
    while free and (keep_under is None or total > keep_under):
        _, name = heapq.heappop(free)
        gone.append(by_name[name])
        total -= by_name[name].size
        for source in by_name[name].inputs:
            needs[source] -= 1
            if not needs[source] and source in by_name and source not in kept:
                heapq.heappush(free, (by_name[source].used, source))
    return gone


def remove_artifact(store: ArtifactStore, entry: Entry) -> bool:
    """Remove an artifact, remotely first; False if it is being built or was used since the survey."""
    with file_lock(store.lock(entry.key), wait=False) as held:
        if not held or _last_found(store, *entry.name) > entry.used:
            return False
        if store.remote and not _remove_at_url(store.remote, entry, store):
            return False
        store.discard(*entry.name)
        store.lock(entry.key).unlink(missing_ok=True)
    return True


def remove_artifacts(store: ArtifactStore, entries: Sequence[Entry]) -> list[Entry]:
    """Remove artifacts in the order of `removable`, but not what one in use was made of; return those that are gone."""
    gone: list[Entry] = []
    needed: set[Name] = set()
    for entry in entries:
        if entry.name not in needed and remove_artifact(store, entry):
            gone.append(entry)
        else:
            needed |= entry.inputs
    return gone


def _remove_at_url(at: Remote, entry: Entry, store: ArtifactStore) -> bool:
    """Remove an artifact from the URL; False if another machine takes it in hand."""
    with claimed(at, *entry.name, store.lock(entry.key), lambda: True, store.lease) as claim:
        for name in sorted(entry.files, key=lambda name: name != MANIFEST):  # manifest first: it makes the artifact
            if claim.is_lost():
                return False
            remote.remove_files(at, [f"{entry.stage}/{entry.key}/{name}"])
        remote.remove_folder(at, f"{entry.stage}/{entry.key}")
    return True


def leftovers(store: ArtifactStore, now: float | None = None) -> list[tuple[str, int]]:
    """What dead processes left in a store's local folder, and their claims at its URL: names below it, and bytes."""
    now, found = time.time() if now is None else now, []
    for folder, age in ((".building", HALF_DONE), (".resume", STATES), (".locks", HALF_DONE)):
        for path in sorted((store.local / folder).glob("*")):
            size, changed = _extent(path)
            if now - changed >= age:
                found.append((f"{folder}/{path.name}", size))
    claims = remote.files(store.remote, CLAIMS) if store.remote else {}
    return found + [(name, size) for name, (size, written) in claims.items() if now - written >= HALF_DONE]


def remove_leftover(store: ArtifactStore, name: str) -> bool:
    """Remove a leftover; False if a process is working on it after all."""
    if store.remote and name.startswith(f"{CLAIMS}/"):
        remote.remove_files(store.remote, [name])
        return True
    path = store.local / name
    lock = store.lock(path.name.partition(".")[0])
    with file_lock(lock, wait=False) as held:
        if not held:
            return False
        shutil.rmtree(path, ignore_errors=True)  # unless it is the lock
        lock.unlink(missing_ok=True)
    return True


def _reports(entries: Iterable[Entry]) -> list[Entry]:
    reports = (entry for entry in entries if entry.stage in (*REPORTS, *FORMER) and MANIFEST in entry.files)
    return sorted(reports, key=lambda entry: -entry.used)


def _reach(by_name: Mapping[Name, Entry], roots: Iterable[Name]) -> set[Name]:
    """The roots and all they were made of, as far as it exists."""
    reached: set[Name] = set()
    new = set(roots)
    while new := (new & by_name.keys()) - reached:
        reached |= new
        new = {source for name in new for source in by_name[name].inputs}
    return reached


def _last_found(store: ArtifactStore, stage: str, key: str) -> float:
    try:
        return store.folder(stage, key).lstat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return 0.0


def _files_of(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=raise_unless_gone):
        yield from (Path(parent, name) for name in names)
        yield from (Path(parent, name) for name in folders if Path(parent, name).is_symlink())


def _extent(path: Path) -> tuple[int, float]:
    """Bytes of the files in a folder, and when anything in it last changed; now if it vanishes meanwhile."""
    try:
        stats = [path.lstat(), *(file.lstat() for file in _files_of(path))]
    except OSError:
        return 0, time.time()
    return sum(s.st_size for s in stats[1:]), max(s.st_mtime for s in stats)
