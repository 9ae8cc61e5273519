"""Store housekeeping: which reports used an artifact, and what may be removed.

A report keeps everything it was made of: its manifest names its inputs, and theirs name their own. Ages count from the
last time an artifact was found or published, because a nightly run may read what was made long ago. Files behind a URL
do not record reads; their ages count from publishing or the last use on this machine, whichever is later.
"""

from __future__ import annotations

import heapq
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tailored_llama.errors import InputError
from tailored_llama.store import remote
from tailored_llama.store.artifacts import ArtifactStore
from tailored_llama.store.claims import CLAIMS, claimed
from tailored_llama.store.contents import Entry, Name, files_of, is_unreadable, last_found
from tailored_llama.store.files import file_lock
from tailored_llama.store.manifests import FINISHED, GGUF, MANIFEST
from tailored_llama.store.remote import Remote

REPORTS = ("report", "sweep", "transfer", "prompt-study", "smallest")  # final results: no stage reads them
HALF_DONE = 6 * 3600.0  # seconds after which unfinished work that nobody holds is a leftover
STATES = 7 * 86400.0  # the same for training states, which a run days later may resume


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

    Args:
        older_than: seconds; artifacts used more recently stay, with all they were made of.
        keep_under: bytes; the oldest go until the store is at most that large; absent: all that may go.
        keep_reports: how many of the newest reports stay, with all they were made of; absent: all.
        now: seconds since 1970; absent: the current time.

    Raises:
        InputError: the manifest of an artifact that stays is unreadable, so its inputs are unknown.
    """
    by_name = {entry.name: entry for entry in entries}
    now = time.time() if now is None else now
    young = [entry.name for entry in entries if now - entry.used < older_than and not is_unreadable(entry)]
    kept = _reach(by_name, [entry.name for entry in _reports(entries)[:keep_reports]] + young)
    for stage in (FINISHED, GGUF):  # the second is made from the first
        kept |= {e.name for e in entries if e.stage == stage and e.inputs and e.inputs <= kept}
    if unreadable := [by_name[name] for name in sorted(kept) if is_unreadable(by_name[name])]:
        first = unreadable[0]
        raise InputError(
            f"{first.stage}/{first.key}: {first.problem}, so what it used is not known; allowed: a store whose "
            "reports are whole (repeat that run, or remove the folder)"
        )
    needs = Counter(name for entry in entries for name in entry.inputs)
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
        if not held or last_found(store, *entry.name) > entry.used:
            return False
        if store.remote and not _remove_at_url(store.remote, entry, store):
            return False
        folder = store.folder(*entry.name)
        if folder.is_symlink() or folder.exists():
            store.discard(*entry.name)
        store.lock(entry.key).unlink(missing_ok=True)
    return True


def remove_artifacts(store: ArtifactStore, entries: Sequence[Entry]) -> list[Entry]:
    """Remove artifacts in the order of `removable`; return those that are gone.

    One that is in use stays, and so does all that it was made of.
    """
    gone: list[Entry] = []
    needed: set[Name] = set()
    for entry in entries:
        if entry.name not in needed and remove_artifact(store, entry):
            gone.append(entry)
        else:
            needed |= entry.inputs
    return gone


def _remove_at_url(at: Remote, entry: Entry, store: ArtifactStore) -> bool:
    """Remove an artifact from the URL; False if another machine has it in hand."""
    with claimed(at, *entry.name, store.lock(entry.key), lambda: True, store.lease) as claim:
        for name in sorted(entry.files, key=lambda name: name != MANIFEST):  # manifest first: it makes the artifact
            if claim.is_lost():
                return False
            remote.remove_files(at, [f"{entry.stage}/{entry.key}/{name}"])
        remote.remove_folder(at, f"{entry.stage}/{entry.key}")
    return True


def leftovers(store: ArtifactStore, now: float | None = None) -> list[tuple[Path, int]]:
    """What is of no use in a store's local folder, with sizes in bytes.

    Dead processes left partial work, training states and lock files. Stamps outlive artifacts removed by hand.
    """
    now, paths = time.time() if now is None else now, []
    for folder, age in ((".building", HALF_DONE), (".resume", STATES), (".locks", HALF_DONE)):
        for path in sorted((store.local / folder).glob("*")):
            size, changed = _extent(path)
            if now - changed >= age:
                paths.append((path, size))
    stamps = sorted((store.local / ".verified").glob("*"))
    return paths + [(path, _extent(path)[0]) for path in stamps if not any(store.local.glob(f"[!.]*/{path.name}"))]


def abandoned_claims(store: ArtifactStore, now: float | None = None) -> list[str]:
    """Claims that dead processes left at the URL of a store."""
    if not (at := store.remote):
        return []
    before, old = (time.time() if now is None else now) - HALF_DONE, []
    for name in remote.names(at, CLAIMS):
        with suppress(FileNotFoundError):
            if remote.written(at, f"{CLAIMS}/{name}") < before:  # by the store's clock
                old.append(f"{CLAIMS}/{name}")
    return old


def remove_claims(store: ArtifactStore, names: Sequence[str]) -> None:
    if store.remote:
        remote.remove_files(store.remote, names)


def remove_leftover(store: ArtifactStore, path: Path) -> bool:
    """Remove a leftover; False if a process is working on it after all."""
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


def _reports(entries: Iterable[Entry]) -> list[Entry]:
    reports = (entry for entry in entries if entry.stage in REPORTS and MANIFEST in entry.files)
    return sorted(reports, key=lambda entry: -entry.used)


def _reach(by_name: Mapping[Name, Entry], roots: Iterable[Name]) -> set[Name]:
    """The roots and all they were made of, as far as it exists."""
    reached: set[Name] = set()
    new = set(roots)
    while new := (new & by_name.keys()) - reached:
        reached |= new
        new = {source for name in new for source in by_name[name].inputs}
    return reached


def _extent(path: Path) -> tuple[int, float]:
    """Bytes of a file or folder, and when anything in it last changed; now if it vanishes meanwhile."""
    try:
        stats = [path.lstat(), *(file.lstat() for file in files_of(path))]
    except OSError:
        return 0, time.time()
    return sum(s.st_size for s in stats[1:]) or stats[0].st_size * path.is_file(), max(s.st_mtime for s in stats)
