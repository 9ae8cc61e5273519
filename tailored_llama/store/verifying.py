"""Whether a folder is the artifact it should be, and the stamps that spare hashing a file twice on one machine.

A stamp is a file's size, modification time and inode number when it was hashed. It stands in for the hash while all
three stay as they are.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tailored_llama.errors import InputError
from tailored_llama.store.files import sha256_file
from tailored_llama.store.manifests import check_identity, links_or_strangers, read_manifest, size_problem

SETTLED = 2.0  # seconds; a file may change once more within one tick of its file system's clock, and keep its time

Stamp = tuple[int, int, int]  # size in bytes, modification time in nanoseconds, inode


@dataclass(frozen=True)
class Stamps:
    """The stamps of the files that were hashed, under the digest of the manifest that states their hashes."""

    digest: str
    files: Mapping[str, Stamp]


_STAMPS = TypeAdapter(Stamps)


def check(folder: Path, stage: str, key: str, known: Stamps | None) -> tuple[str | None, Stamps | None]:
    """Why a folder is not the artifact it should be, or None if it is; then also the stamps of its files.

    Files whose stamps are known are not hashed. Files that changed within the last `SETTLED` seconds get no stamp.
    """
    try:
        manifest = read_manifest(folder)
        check_identity(manifest, stage, key)
    except InputError as error:
        return str(error), None
    if problem := links_or_strangers(folder, manifest):
        return problem, None
    stamps = {name: _stamp(folder / name) for name in manifest.files if (folder / name).is_file()}
    if problem := size_problem(manifest, {name: stamp[0] for name, stamp in stamps.items()}):
        return problem, None
    for name, entry in manifest.files.items():
        if not (known and known.digest == manifest.digest and known.files.get(name) == stamps[name]):
            settled = is_settled(stamps[name])
            if (got := sha256_file(folder / name)) != entry["sha256"]:
                return f"{name} has SHA-256 {got}, expected {entry['sha256']}", None
            if not settled:
                del stamps[name]
    return None, Stamps(manifest.digest, stamps)


def hash_files(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Stamp]]:
    """The files of a new artifact as its manifest lists them, and the stamps of those that have settled."""
    files, stamps = {}, {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name, stamp = str(path.relative_to(folder)), _stamp(path)
            if is_settled(stamp):
                stamps[name] = stamp
            files[name] = {"sha256": sha256_file(path), "size": stamp[0]}
    return files, stamps


def is_settled(stamp: Stamp) -> bool:
    """Whether any later change of the file will show in its modification time; ask before hashing it."""
    return abs(time.time() - stamp[1] / 1e9) > SETTLED


class Verified:
    """The stamps of a store's artifacts by key, in memory and in a folder for the other processes of the machine.

    They are kept in memory only where the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stamps: dict[str, Stamps] = {}

    def known(self, key: str) -> Stamps | None:
        """The stamps of an artifact's files; None if there are none, or not as `remember` wrote them."""
        with contextlib.suppress(OSError, ValueError):
            return self._stamps.get(key) or _STAMPS.validate_json((self.folder / key).read_bytes())
        return None

    def remember(self, key: str, stamps: Stamps | None) -> None:
        """Keep the stamps of an artifact's files instead of those known; None or no files: forget them."""
        path = self.folder / key
        if stamps and stamps.files:
            if stamps != self.known(key):
                new = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
                with contextlib.suppress(OSError):
                    path.parent.mkdir(exist_ok=True)
                    new.write_bytes(_STAMPS.dump_json(stamps))
                    os.replace(new, path)  # whole or not at all
            self._stamps[key] = stamps
        else:
            self._stamps.pop(key, None)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
