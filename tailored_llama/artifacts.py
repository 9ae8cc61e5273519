"""The artifact store: the one cache of the pipeline, with or without Prefect.

An artifact is a folder of files and a `manifest.json`, published by one stage under a key that names everything its
bytes depend on. A folder without a whole manifest, or with a file that is missing or altered, is not an artifact:
`find` removes it and the stage runs again.
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
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tailored_llama import remote
from tailored_llama.errors import InputError, one_line
from tailored_llama.files import NO_ROOM, error_number, file_lock, is_safe_relative, sha256_file
from tailored_llama.manifests import (
    MANIFEST,
    ArtifactRef,
    Manifest,
    artifact_key,
    check_identity,
    links_or_strangers,
    read_manifest,
)
from tailored_llama.memory import peak_memory, reset_peak_memory

_LIBRARIES = ("torch", "transformers", "peft", "torch-pruning", "datasets", "pyarrow", "tailored-llama")
_VALUES_PER_BYTE = 100  # of a table that tells its rows apart; constant columns alone are packed tighter
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}  # the store's fault only for paths in the store


class ArtifactStore:
    """Artifacts in a local folder, or behind any fsspec URL with a local folder as its working copy.

    Args:
        root: a folder, or an fsspec URL such as s3://bucket/prefix.
        working_copy: where artifacts of a URL are kept locally; not used for a folder.
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
            raise InputError(f"artifact {stage}/{key}: not a name in a store; allowed: a stage and a key")
        return self.local / stage / key

    def lock(self, key: str) -> Path:
        """What a process locks while it builds or removes the artifacts of a key."""
        return self.local / ".locks" / key

    def resume_folder(
        self, stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, ArtifactRef]
    ) -> Path:
        """Where the stage of this key may keep its state while it runs; it goes when the artifact is published."""
        return self.local / ".resume" / artifact_key(stage, version, _plain(config), inputs)

    def build(
        self,
        stage: str,
        version: int,
        config: Mapping[str, Any],
        inputs: Mapping[str, ArtifactRef],
        function: Callable[[Path], Mapping[str, Any] | None],
    ) -> tuple[ArtifactRef, bool]:
        """Return the artifact of this key, running `function(folder)` to write its files where there is none.

        Two callers with the same key compute it once: the second waits for the first. What `function` returns goes
        into the manifest's `measured`.

        Returns:
            The reference, and whether the artifact had been there before.

        Raises:
            InputError: the store's root cannot be written, or its disk is full.
        """
        plain = _plain(config)
        key = artifact_key(stage, version, plain, inputs)
        try:
            if not (found := self.find(stage, key)):
                with file_lock(self.lock(key)):
                    if not (found := self.find(stage, key)):  # no other process published it while this one waited
                        return self._build(stage, version, key, plain, inputs, function), False
            self._forget_state(key)  # of a process that was killed just after publishing
            if self.remote and not self._is_remote(stage, key):  # pushing it failed before
                self._push(read_manifest(self.folder(stage, key)))
            return found, True
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
        for left in building.glob(f"{key}.*"):  # of a killed process: the lock says nobody is at work on it
            shutil.rmtree(left, ignore_errors=True)
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
            if not _rename_new(folder, target):  # pulled from the URL meanwhile, by a process that takes no lock
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
        """The reference of a published artifact whose every file is whole; a broken one is removed.

        The folder's modification time says when the artifact was last found: housekeeping counts its age from there.
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
        with contextlib.suppress(OSError):  # a read-only store is still read
            os.utime(folder)
        return read_manifest(folder).ref

    def discard(self, stage: str, key: str) -> None:
        """Remove the local folder of an artifact, if it is still there: renamed first, so that nobody finds half."""
        trash = self.local / ".building" / f"{key}.{uuid.uuid4().hex[:8]}"
        trash.parent.mkdir(exist_ok=True)
        try:
            os.rename(self.folder(stage, key), trash)
        except FileNotFoundError:
            return  # another process was quicker
        if trash.is_symlink():
            trash.unlink()
        else:
            shutil.rmtree(trash, ignore_errors=True)

    def open(self, ref: ArtifactRef) -> Path:
        """The folder of an artifact, every file verified against the manifest.

        Raises:
            InputError: it is missing, broken, or holds something else than the reference names.
        """
        found = self.find(ref.stage, ref.key)
        if found is None:
            raise InputError(f"artifact {ref.stage}/{ref.key[:12]}: missing from {self.root}; run its stage again")
        if found.digest != ref.digest:
            raise InputError(
                f"artifact {ref.stage}/{ref.key[:12]}: digest {found.digest[:12]}, expected {ref.digest[:12]}"
            )
        return self.folder(ref.stage, ref.key)

    def manifest(self, ref: ArtifactRef) -> Manifest:
        return read_manifest(self.open(ref))

    def list(self) -> Iterator[tuple[Manifest | None, Path, str | None]]:
        """Every artifact of the local folder: its manifest, its folder, and what is wrong with it, if anything."""
        for folder in sorted(self.local.glob("[!.]*/*")):
            if folder.is_dir():
                problem = self.problem(folder, folder.parent.name, folder.name)
                yield (None if problem else read_manifest(folder)), folder, problem

    def problem(self, folder: Path, stage: str, key: str) -> str | None:
        """What keeps a folder from being the artifact it should be; None where nothing does."""
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
        remote.push(self.remote, folder, target, [*manifest.files, MANIFEST])  # without a manifest it is no artifact

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
        """Copy an artifact from behind the URL into an empty folder, and verify it; what is wrong with it, if anything.

        Its manifest bears the time at which the artifact was published, not that of the copy.

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
    """As JSON has it: the manifest shows what the key was made of."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(config)))
    return plain


def schema_of(row: type[Any]) -> pa.Schema:
    """The table schema of a dataclass of str, int, float and bool fields, each perhaps None."""
    types = {"float": pa.float64(), "int": pa.int64(), "str": pa.string(), "bool": pa.bool_()}
    return pa.schema([(field.name, types[str(field.type).split(" ")[0]]) for field in fields(row)])


def write_table(path: Path, columns: Mapping[str, Any], schema: pa.Schema) -> None:
    """Write a Parquet file whose columns are exactly the declared schema's."""
    if set(columns) != set(schema.names):
        raise ValueError(f"{path.name}: columns {sorted(columns)}, declared {sorted(schema.names)}")
    pq.write_table(pa.table({name: columns[name] for name in schema.names}, schema=schema), path)


def read_table(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """Read a Parquet file and check that it has the declared schema, where one is given.

    Raises:
        InputError: the file is missing, not Parquet, of another schema, or claims more than it can hold.
    """
    try:
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow
            if schema and not found.remove_metadata().equals(schema.remove_metadata()):
                wrong = [f.name for f in schema if f.name not in found.names or not found.field(f.name).equals(f)]
                raise InputError(f"{path}: column {(wrong or found.names)[0]} is not as declared ({schema.names})")
            _check_claims(file.metadata, path)
            table, claimed = file.read(), file.metadata.num_rows
        if table.num_rows != claimed:
            raise OSError(f"{table.num_rows} rows, where it claims {claimed}")
        return table
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0][:120]})") from None


def _check_claims(metadata: Any, path: Path) -> None:
    """Believe no more values than a file of this size may hold: pyarrow makes room for all of them at once."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [[group.column(number).num_values for group in groups] for number in range(metadata.num_columns)]
    claimed, size = max([metadata.num_rows, *map(sum, columns)]), path.stat().st_size
    if not 0 <= claimed <= size * _VALUES_PER_BYTE:
        raise InputError(
            f"{path}: a column claims {claimed:,} values in {size:,} bytes; allowed: at most {_VALUES_PER_BYTE} a byte"
        )


def _rename_new(folder: Path, target: Path) -> bool:
    """Rename a folder to a name that is free; False where another process was quicker."""
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
