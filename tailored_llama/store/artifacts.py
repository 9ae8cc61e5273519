"""The artifact store: the pipeline's only cache, with or without Prefect.

An artifact is a folder of files and a `manifest.json`. A stage publishes it under a key over everything its bytes
depend on. A folder with a broken or missing manifest, or a missing or altered file, is not an artifact: `find` removes
it and the stage runs again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tailored_llama.errors import InputError, one_line
from tailored_llama.memory import peak_memory, reset_peak_memory
from tailored_llama.store import remote
from tailored_llama.store.files import NO_ROOM, error_number, file_lock, is_safe_relative, sha256_file
from tailored_llama.store.manifests import (
    MANIFEST,
    ArtifactRef,
    Manifest,
    artifact_key,
    check_identity,
    links_or_strangers,
    read_manifest,
)

_LIBRARIES = ("torch", "transformers", "peft", "torch-pruning", "datasets", "pyarrow", "tailored-llama")
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}  # the store's fault only inside it


class ArtifactStore:
    """Artifacts in a local folder, or behind any fsspec URL with a local working copy.

    Args:
        root: a folder, or an fsspec URL such as s3://bucket/prefix.
        working_copy: local folder for the artifacts of a URL; unused if `root` is a folder.
    """

    def __init__(self, root: str, working_copy: str = "~/.cache/tailored-llama/artifacts") -> None:
        self.root = root
        self.remote: remote.Remote | None = None
        if "://" in root:
            self.remote = remote.open_remote(root)
            self.local = Path(working_copy).expanduser() / hashlib.sha256(root.encode()).hexdigest()[:16]
        else:
            self.local = Path(root).expanduser().absolute()
        self._verified: dict[Path, tuple[int, int]] = {}

    def folder(self, stage: str, key: str) -> Path:
        if not is_safe_relative(f"{stage}/{key}"):
            raise InputError(f"artifact {stage}/{key}: not an artifact name; allowed: a stage and a key")
        return self.local / stage / key

    def lock(self, key: str) -> Path:
        """The file a process locks while it builds or removes the artifacts of a key."""
        return self.local / ".locks" / key

    def resume_folder(
        self, stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, ArtifactRef]
    ) -> Path:
        """Folder for the state of a running stage; it is removed when the artifact is published."""
        return self.local / ".resume" / artifact_key(stage, version, _plain(config), inputs)

    def build(
        self,
        stage: str,
        version: int,
        config: Mapping[str, Any],
        inputs: Mapping[str, ArtifactRef],
        function: Callable[[Path], Mapping[str, Any] | None],
    ) -> tuple[ArtifactRef, bool]:
        """Return the artifact of this key; if there is none, run `function(folder)` to write its files.

        Two callers with the same key compute it once: the second waits for the first. The return value of `function`
        goes into the manifest's `measured`.

        Returns:
            The reference, and whether the artifact already existed.

        Raises:
            InputError: the store's root is not writable, or its disk is full.
        """
        plain = _plain(config)
        key = artifact_key(stage, version, plain, inputs)
        try:
            if not (ref := self.find(stage, key)):
                with file_lock(self.lock(key)):
                    if not (ref := self.find(stage, key)):  # another process may have published it meanwhile
                        return self._build(stage, version, key, plain, inputs, function), False
            self._forget_state(key)  # left by a process killed just after publishing
            if self.remote and not self._is_remote(stage, key):  # an earlier push failed
                self._push(read_manifest(self.folder(stage, key)))
            return ref, True
        except Exception as error:
            number = error_number(error)
            inside = str(getattr(error, "filename", None)).startswith(str(self.local))
            if number is None or not (number in NO_ROOM or (number in _NO_ACCESS and inside)):
                raise
            raise InputError(
                f"store.root {self.root}: {os.strerror(number)} while publishing {stage}; "
                "allowed: a writable folder with room"
            ) from error

    def _build(
        self,
        stage: str,
        version: int,
        key: str,
        config: dict[str, Any],
        inputs: Mapping[str, ArtifactRef],
        function: Callable[[Path], Mapping[str, Any] | None],
    ) -> ArtifactRef:
        building = self.local / ".building"
        for leftover in building.glob(f"{key}.*"):  # of a killed process: this one holds the lock
            shutil.rmtree(leftover, ignore_errors=True)
        folder = building / f"{key}.{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        try:
            start = time.perf_counter()
            reset_peak_memory()
            measured = dict(function(folder) or {})
            manifest = Manifest(
                stage=stage,
                version=version,
                key=key,
                config=config,
                inputs=dict(inputs),
                files={
                    str(path.relative_to(folder)): {"sha256": sha256_file(path), "size": path.stat().st_size}
                    for path in sorted(folder.rglob("*"))
                    if path.is_file()
                },
                libraries={name: importlib.metadata.version(name) for name in _LIBRARIES},
                seconds=round(time.perf_counter() - start, 3),
                peak_memory_bytes=peak_memory(),
                measured=measured,
            )
            (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n")
            target = self.folder(stage, key)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not _rename_new(folder, target):  # pulled meanwhile; pulls take no lock
                shutil.rmtree(folder)
                return read_manifest(target).ref
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._forget_state(key)
        if self.remote:
            self._push(manifest)
        return manifest.ref

    def _forget_state(self, key: str) -> None:
        shutil.rmtree(self.local / ".resume" / key, ignore_errors=True)

    def find(self, stage: str, key: str) -> ArtifactRef | None:
        """The reference of a published artifact with every file intact, or None; a broken artifact is removed.

        Each find updates the folder's modification time, from which housekeeping counts the artifact's age.
        """
        folder = self.folder(stage, key)
        if not folder.is_dir():
            return self._pull(stage, key)
        if problem := self.problem(folder, stage, key):
            try:
                self.discard(stage, key)
            except OSError as error:
                raise InputError(f"artifact {stage}/{key[:12]}: {problem}, and it cannot be removed") from error
            return self._pull(stage, key)
        with contextlib.suppress(OSError):  # a read-only store can still be read
            os.utime(folder)
        return read_manifest(folder).ref

    def discard(self, stage: str, key: str) -> None:
        """Remove an artifact's local folder if it exists. It is renamed first, so that nobody finds half of it."""
        trash = self.local / ".building" / f"{key}.{uuid.uuid4().hex[:8]}"
        trash.parent.mkdir(exist_ok=True)
        try:
            os.rename(self.folder(stage, key), trash)
        except FileNotFoundError:
            return  # another process removed it first
        if trash.is_symlink():
            trash.unlink()
        else:
            shutil.rmtree(trash, ignore_errors=True)

    def open(self, ref: ArtifactRef) -> Path:
        """The folder of an artifact, with every file verified against the manifest.

        Raises:
            InputError: the artifact is missing or broken, or its digest differs from the reference.
        """
        stored = self.find(ref.stage, ref.key)
        if stored is None:
            raise InputError(f"artifact {ref.stage}/{ref.key[:12]}: missing from {self.root}; run its stage again")
        if stored.digest != ref.digest:
            raise InputError(
                f"artifact {ref.stage}/{ref.key[:12]}: digest {stored.digest[:12]}, expected {ref.digest[:12]}"
            )
        return self.folder(ref.stage, ref.key)

    def manifest(self, ref: ArtifactRef) -> Manifest:
        return read_manifest(self.open(ref))

    def list(self) -> Iterator[tuple[Manifest | None, Path, str | None]]:
        """Every artifact in the local folder: its manifest, its folder, and its problem or None."""
        for folder in sorted(self.local.glob("[!.]*/*")):
            if folder.is_dir():
                problem = self.problem(folder, folder.parent.name, folder.name)
                yield (None if problem else read_manifest(folder)), folder, problem

    def problem(self, folder: Path, stage: str, key: str) -> str | None:
        """Why a folder is not the artifact it should be, or None if it is."""
        try:
            manifest = read_manifest(folder)
        except InputError as error:
            return str(error)
        if problem := check_identity(manifest, stage, key) or links_or_strangers(folder, manifest):
            return problem
        for name, entry in manifest.files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            status = path.stat()
            if status.st_size != entry["size"]:
                return f"{name} has {status.st_size} bytes, expected {entry['size']}"
            stamp = (status.st_size, status.st_mtime_ns)
            if self._verified.get(path) != stamp:  # hash each file once per process
                if (got := sha256_file(path)) != entry["sha256"]:
                    return f"{name} has SHA-256 {got}, expected {entry['sha256']}"
                self._verified[path] = stamp
        return None

    def _is_remote(self, stage: str, key: str) -> bool:
        assert self.remote
        return remote.is_there(self.remote, f"{stage}/{key}/{MANIFEST}")

    def _push(self, manifest: Manifest) -> None:
        assert self.remote
        target, folder = f"{manifest.stage}/{manifest.key}", self.folder(manifest.stage, manifest.key)
        remote.push(self.remote, folder, target, [*manifest.files, MANIFEST])  # manifest last: it makes the artifact

    def _pull(self, stage: str, key: str) -> ArtifactRef | None:
        if not self.remote or not self._is_remote(stage, key):
            return None
        folder = self.local / ".building" / f"{key}.{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        try:
            if self.fetch(stage, key, folder):
                return None
            self.folder(stage, key).parent.mkdir(parents=True, exist_ok=True)
            _rename_new(folder, self.folder(stage, key))
            return read_manifest(self.folder(stage, key)).ref
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def fetch(self, stage: str, key: str, folder: Path) -> str | None:
        """Copy an artifact from the URL into an empty folder and verify it; return its problem or None.

        The copied manifest keeps the time at which the artifact was published.

        Raises:
            InputError, UnreachableError: as `remote.pull`.
        """
        assert self.remote
        source = f"{stage}/{key}"
        try:
            remote.pull(self.remote, source, [MANIFEST], folder)
            try:
                manifest = read_manifest(folder)
            except InputError as error:
                return str(error)
            if problem := check_identity(manifest, stage, key):
                return problem
            remote.pull(self.remote, source, list(manifest.files), folder)
            published = remote.written(self.remote, f"{source}/{MANIFEST}")
            os.utime(folder / MANIFEST, (published, published))
        except FileNotFoundError as error:
            return f"{one_line(error)} is missing"
        return self.problem(folder, stage, key)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as JSON stores it, so that the manifest shows what the key covers."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(config)))
    return plain


def _rename_new(folder: Path, target: Path) -> bool:
    """Rename a folder to an unused name; False if another process took the name first."""
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
