"""Manifests and keys of artifacts, and the check that a folder is what its manifest states.

Stamps spare hashing a file twice on one machine. A stamp is a line of text: a file's inode, modification time and size
when it was hashed, and its SHA-256. It stands in for the hash while the first three stay as they are. A line that is
cut short matches nothing.
"""

import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tailored_llama.errors import InputError
from tailored_llama.files import unfinished
from tailored_llama.store.files import is_safe_relative, raise_unless_gone, sha256_file

MANIFEST, CERTIFICATE = "manifest.json", "certificate.json"
# Stages of finished models, which may be exported and replaced.
FINISHED, GGUF, ANSWER = "tailored", "gguf", "answer"
_LIBRARIES = ("torch", "transformers", "peft", "torch-pruning", "datasets", "pyarrow", "tailored-llama")
_LARGEST = 2**22  # bytes of a manifest: a thousand times the usual
_SETTLED = 2.0  # seconds; a file may change once more within one tick of its file system's clock, and keep its time


@dataclass(frozen=True)
class ArtifactRef:
    """What stages pass to each other: where an artifact is (stage, key) and its content (digest)."""

    stage: str
    key: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    """The record of an artifact: how it was made, its files, and what it cost to make."""

    stage: str
    version: int
    key: str
    config: dict[str, Any]
    inputs: dict[str, ArtifactRef]
    files: dict[str, dict[str, Any]]  # relative name → {"sha256": hex, "size": bytes}
    libraries: dict[str, str]  # versions; keys do not have them, so machines may mix them
    seconds: float
    peak_memory_bytes: int
    measured: dict[str, Any]  # values that differ between runs (tokens/s, …); never part of a file

    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def digest(self) -> str:
        return _digest({name: entry["sha256"] for name, entry in self.files.items()})

    @property
    def ref(self) -> ArtifactRef:
        return ArtifactRef(self.stage, self.key, self.digest)


_MANIFEST = TypeAdapter(Manifest)


@cache
def installed_versions() -> dict[str, str]:
    """The installed version of each library that may change an artifact."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def other_versions(recorded: Mapping[str, str]) -> set[str]:
    """Libraries recorded in another version than is installed, each with both; build tags, as +cpu, do not count."""
    both = [(name, version, installed_versions().get(name, "")) for name, version in recorded.items()]
    differ = [one for one in both if one[1].partition("+")[0] != one[2].partition("+")[0]]
    return {f"{name} {version} (here {own})" for name, version, own in differ}


def artifact_key(stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, ArtifactRef]) -> str:
    """SHA-256 over the stage, its version, the configuration it reads and the digests of its inputs."""
    digests = {name: ref.digest for name, ref in inputs.items()}
    return _digest({"stage": stage, "version": version, "config": dict(config), "inputs": digests})


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        InputError: it is missing or not a manifest, or names a file outside its folder.
        OSError: it cannot be read, which says nothing about the artifact.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{path} is missing")
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(content: bytes, location: str) -> Manifest:
    """As `read_manifest`, from its bytes; `location` is its path in error messages."""
    if len(content) > _LARGEST:  # a list of all that is wrong with it could fill the memory
        raise InputError(f"{location}: not a manifest ({len(content):,} bytes)")
    try:
        manifest = _MANIFEST.validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = f"{'.'.join(map(str, first['loc']))!r:.80}: " if first["loc"] else ""
        raise InputError(f"{location}: not a manifest ({field}{first['msg']})") from None
    files = manifest.files
    nested = any(str(parent) in files for name in files for parent in PurePosixPath(name).parents)
    if nested or MANIFEST in files or not all({"sha256", "size"} <= entry.keys() for entry in files.values()):
        raise InputError(f"{location}: not a manifest (its files cannot be such)")
    if not all(is_safe_relative(name) for name in files):
        raise InputError(f"{location}: names a file outside its folder")
    return manifest


def check_identity(manifest: Manifest, stage: str, key: str) -> None:
    """Refuse a manifest that does not belong to the artifact in whose folder it is."""
    if (manifest.stage, manifest.key) != (stage, key):
        raise InputError(f"manifest of {manifest.stage}/{manifest.key[:12]}")
    if artifact_key(stage, manifest.version, manifest.config, manifest.inputs) != key:
        raise InputError("its key does not follow from its manifest")


def check_sizes(manifest: Manifest, sizes: Mapping[str, int]) -> None:
    """Refuse sizes of files, in bytes, that are not those of the manifest."""
    for name, entry in manifest.files.items():
        if name not in sizes:
            raise InputError(f"{name} is missing")
        if sizes[name] != entry["size"]:
            raise InputError(f"{name} has {sizes[name]} bytes, expected {entry['size']}")


def check(folder: Path, stage: str, key: str, known: set[str]) -> tuple[str | None, set[str]]:
    """Why a folder is not the artifact it should be, or None; and the stamps of its files. Known ones spare hashing."""
    try:
        manifest = read_manifest(folder)
        check_identity(manifest, stage, key)
        _check_no_strangers(folder, manifest)
        return None, _check_files(folder, manifest, known)
    except InputError as error:
        return str(error), set()


def hash_files(folder: Path) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """The files of a new artifact as its manifest lists them, and the stamps of those that have settled."""
    files, stamps = {}, set()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            settled, sha256 = _is_settled(status), sha256_file(path)
            files[str(path.relative_to(folder))] = {"sha256": sha256, "size": status.st_size}
            if settled:
                stamps.add(_stamp(status, sha256))
    return files, stamps


def write_stamps(path: Path, stamps: set[str]) -> None:
    """Write the file of an artifact's stamps, whole or not at all; without stamps there is none."""
    if not stamps:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    with unfinished(path) as new:
        new.write_text("".join(f"{stamp}\n" for stamp in sorted(stamps)))


def read_stamps(path: Path) -> set[str]:
    """The stamps in a file; none if it cannot be read."""
    with suppress(OSError):
        return set(path.read_text(errors="replace").splitlines())
    return set()


def _check_no_strangers(folder: Path, manifest: Manifest) -> None:
    """Refuse symbolic links and unlisted files: a loader could follow the one and read the other."""
    if folder.is_symlink():
        raise InputError("is a symbolic link")
    for parent, folders, names in os.walk(folder, onerror=raise_unless_gone):
        for name in (*folders, *names):
            path = Path(parent, name)
            relative = str(path.relative_to(folder))
            if path.is_symlink():
                raise InputError(f"{relative} is a symbolic link")
            if name in names and relative not in manifest.files and relative != MANIFEST and not name.startswith("."):
                raise InputError(f"{relative} is not in its manifest")


def _check_files(folder: Path, manifest: Manifest, known: set[str]) -> set[str]:
    """Check sizes, and the hashes of files whose stamps are not known; return the stamps of those that have settled."""
    statuses = {name: (folder / name).stat() for name in manifest.files if (folder / name).is_file()}
    check_sizes(manifest, {name: status.st_size for name, status in statuses.items()})
    stamps = set()
    for name, status in statuses.items():
        expected = manifest.files[name]["sha256"]
        settled, stamp = _is_settled(status), _stamp(status, expected)
        if stamp not in known and (got := sha256_file(folder / name)) != expected:
            raise InputError(f"{name} has SHA-256 {got}, expected {expected}")
        if settled:
            stamps.add(stamp)
    return stamps


def _is_settled(status: os.stat_result) -> bool:
    """Whether any later change of the file will show in its modification time; ask before hashing it."""
    return abs(time.time() - status.st_mtime) > _SETTLED


def _stamp(status: os.stat_result, sha256: str) -> str:
    return f"{status.st_ino} {status.st_mtime_ns} {status.st_size} {sha256}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_certified(folder: Path, names: Iterable[str], sha256: Mapping[str, str]) -> None:
    """Check that files of a model are those that its certificate lists; InputError: one is not, or is not listed."""
    for name in names:
        file, expected = folder / name, sha256.get(name)
        if expected is None and file.exists():
            raise InputError(f"{file}: not in model.sha256 of the certificate; allowed: files that it lists")
        if expected is not None and (not file.is_file() or sha256_file(file) != expected):
            raise InputError(f"{file}: missing or changed since it was certified; allowed: SHA-256 {expected[:12]}…")
