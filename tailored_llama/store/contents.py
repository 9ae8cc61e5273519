"""What is in a store: its artifacts, whole or damaged, and when they were last used."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tailored_llama.errors import InputError
from tailored_llama.store import remote, sharing
from tailored_llama.store.artifacts import ArtifactStore
from tailored_llama.store.files import walk
from tailored_llama.store.manifests import MANIFEST, Manifest, check_identity, parse_manifest, size_problem

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


def survey(store: ArtifactStore) -> list[Entry]:
    """All artifacts of a store, by stage and key; for a URL the remote ones, not the working copy."""
    return sorted(_remote_entries(store) if store.remote else _local_entries(store), key=lambda entry: entry.name)


def verify(store: ArtifactStore) -> Iterator[tuple[str, str | None]]:
    """Hash every file of every artifact; yield the artifact's location, and its problem or None.

    Artifacts of a URL are fetched into a temporary folder; the working copy is not checked.
    """
    for entry in survey(store):
        root, problem = store.root.rstrip("/"), entry.problem
        if not store.remote:
            root, problem = str(store.local), store.problem(store.folder(*entry.name), *entry.name, trust=False)
        elif not problem:
            with tempfile.TemporaryDirectory() as scratch:
                problem, _ = sharing.fetch(store.remote, *entry.name, Path(scratch))
        yield f"{root}/{entry.stage}/{entry.key}", problem


def _local_entries(store: ArtifactStore) -> Iterator[Entry]:
    for folder in store.local.glob("[!.]*/*"):
        stage, key = folder.parent.name, folder.name
        if _is_artifact_name(stage, key) and (folder.is_dir() or folder.is_symlink()):
            sizes = {str(path.relative_to(folder)): path.lstat().st_size for path in files_of(folder)}
            manifest = folder / MANIFEST
            content = manifest.read_bytes() if manifest.is_file() else None
            yield _entry(stage, key, content, sizes, last_found(store, stage, key))


def _remote_entries(store: ArtifactStore) -> Iterator[Entry]:
    assert store.remote
    artifacts: dict[Name, dict[str, tuple[int, float]]] = {}
    for path, size_and_time in remote.files(store.remote).items():
        stage, _, rest = path.partition("/")
        key, _, name = rest.partition("/")
        if name and _is_artifact_name(stage, key):
            artifacts.setdefault((stage, key), {})[name] = size_and_time
    whole = [f"{stage}/{key}/{MANIFEST}" for (stage, key), names in artifacts.items() if MANIFEST in names]
    manifests = remote.read(store.remote, whole)
    for (stage, key), names in artifacts.items():
        sizes = {name: size for name, (size, _) in names.items()}
        used = max(last_found(store, stage, key), *(seconds for _, seconds in names.values()))
        yield _entry(stage, key, manifests.get(f"{stage}/{key}/{MANIFEST}"), sizes, used)


def _entry(stage: str, key: str, content: bytes | None, sizes: Mapping[str, int], used: float) -> Entry:
    manifest: Manifest | None = None
    problem: str | None = f"{MANIFEST} is missing"
    if content is not None:
        try:
            parsed = parse_manifest(content, f"{stage}/{key}/{MANIFEST}")
            check_identity(parsed, stage, key)
            manifest, problem = parsed, size_problem(parsed, sizes)
        except InputError as error:
            problem = str(error)
    return Entry(stage, key, manifest, problem, tuple(sizes), sum(sizes.values()), used)


def is_unreadable(entry: Entry) -> bool:
    """Whether the manifest exists but cannot be read; without one it is no artifact, and nothing refers to it."""
    return entry.manifest is None and MANIFEST in entry.files


def _is_artifact_name(stage: str, key: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", stage) and re.fullmatch(r"[0-9a-f]{64}", key))


def last_found(store: ArtifactStore, stage: str, key: str) -> float:
    try:
        return store.folder(stage, key).lstat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return 0.0


def files_of(folder: Path) -> Iterator[Path]:
    for parent, folders, names in walk(folder):
        yield from (Path(parent, name) for name in names)
        yield from (Path(parent, name) for name in folders if Path(parent, name).is_symlink())
