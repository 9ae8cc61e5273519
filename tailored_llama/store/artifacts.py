"""The artifact store: the pipeline's only cache, with or without Prefect.

An artifact is a folder of files and a `manifest.json`. A stage publishes it under a key over everything its bytes
depend on. A folder with a broken or missing manifest, or a missing or altered file, is not an artifact: `find` removes
it and the stage runs again.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tailored_llama.errors import InputError
from tailored_llama.memory import peak_memory, reset_peak_memory
from tailored_llama.store import manifests, remote
from tailored_llama.store.claims import LEASE, Claim, Lease, claimed
from tailored_llama.store.files import NO_ROOM, error_number, file_lock, is_safe_relative
from tailored_llama.store.manifests import MANIFEST, ArtifactRef, Manifest, artifact_key, read_manifest

_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}  # the store's fault only inside it

Inputs = Mapping[str, ArtifactRef]
Function = Callable[[Path], Mapping[str, Any] | None]  # writes an artifact's files to a folder

log = logging.getLogger(__name__)


class ArtifactStore:
    """Artifacts in a local folder, or behind any fsspec URL, such as s3://bucket/prefix.

    `working_copy` is the local folder for the artifacts of a URL, and `lease` is how long a claim to one holds.
    """

    def __init__(
        self, root: str, working_copy: str = "~/.cache/tailored-llama/artifacts", lease: Lease = LEASE
    ) -> None:
        self.root, self.lease = root, lease
        self.remote: remote.Remote | None = None
        if "://" in root:
            self.remote = remote.open_remote(root)
            self.local = Path(working_copy).expanduser() / hashlib.sha256(root.encode()).hexdigest()[:16]
        else:
            self.local = Path(root).expanduser().absolute()
        self._unwritten: dict[str, set[str]] = {}  # stamps by key, where `.verified` cannot be written
        self._warned: set[str] = set()  # of these versions of libraries

    def folder(self, stage: str, key: str) -> Path:
        if not is_safe_relative(f"{stage}/{key}"):
            raise InputError(f"artifact {stage}/{key}: not an artifact name; allowed: a stage and a key")
        return self.local / stage / key

    def lock(self, key: str) -> Path:
        """The file a process locks while it builds or removes the artifacts of a key."""
        return self.local / ".locks" / key

    def resume_folder(self, key: str) -> Path:
        """Folder for the state of a running stage; it is removed when the artifact is published."""
        return self.local / ".resume" / key

    def build(
        self,
        stage: str,
        version: int,
        config: dict[str, Any],
        inputs: Inputs,
        function: Function,
        check: Callable[[], None] | None = None,
    ) -> tuple[ArtifactRef, bool]:
        """The artifact of this key, and whether it was there; if not, `function(folder)` is run to write its files.

        The configuration is JSON, and so are the names in it: its key has to follow from the manifest.

        Two callers with the same key compute it once, on one machine or on two that share a URL: the second waits for
        the first. The return value of `function` goes into the manifest's `measured`; in it, a function that works in
        another process gives its `peak_memory_bytes`. `check` is called now and then while it waits; what it raises
        ends the wait.

        Raises:
            InputError: the store's root is not writable, or its disk is full.
        """
        key = artifact_key(stage, version, config, inputs)
        resume = self.resume_folder(key)
        try:
            if (ref := self.find(stage, key)) and (not self.remote or (ref := self._pull(stage, key))):
                shutil.rmtree(resume, ignore_errors=True)  # left by a process killed just after publishing
                return ref, True
            with file_lock(self.lock(key), check=check), self._claimed(stage, key, check) as claim:
                # Another process or machine may have published it meanwhile.
                found = self.find(stage, key) or self._pull(stage, key, mend=True)
                ref = found or self._build(stage, version, key, config, inputs, function)
                shutil.rmtree(resume, ignore_errors=True)
                return self._publish(ref, claim), found is not None
        except Exception as error:
            number = error_number(error)
            inside = str(getattr(error, "filename", None)).startswith(str(self.local))
            if number and (number in NO_ROOM or (number in _NO_ACCESS and inside)):
                failure = f"store.root {self.root}: {os.strerror(number)} while publishing {stage}"
                raise InputError(f"{failure}; allowed: a writable folder with room") from error
            raise

    def _build(
        self, stage: str, version: int, key: str, config: dict[str, Any], inputs: Inputs, function: Function
    ) -> ArtifactRef:
        for leftover in (self.local / ".building").glob(f"{key}.*"):  # of a killed process: this one holds the lock
            shutil.rmtree(leftover, ignore_errors=True)
        folder, target = self._new_folder(key), self.folder(stage, key)
        folder.mkdir(parents=True)
        try:
            start = time.perf_counter()
            reset_peak_memory()
            measured = dict(function(folder) or {})
            files, stamps = manifests.hash_files(folder)
            manifest = Manifest(
                stage=stage,
                version=version,
                key=key,
                config=config,
                inputs=dict(inputs),
                files=files,
                libraries=manifests.installed_versions(),
                seconds=round(time.perf_counter() - start, 3),
                peak_memory_bytes=measured.pop("peak_memory_bytes", None) or peak_memory(),
                measured=measured,
            )
            (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n")
            if not _rename_new(folder, target):  # pulled meanwhile; pulls take no lock
                return read_manifest(target).ref
            self._remember(key, stamps)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return manifest.ref

    def find(self, stage: str, key: str) -> ArtifactRef | None:
        """The reference of an artifact, which is whole and counts as used now, or None; a broken one is removed."""
        folder = self.folder(stage, key)
        if not folder.is_dir():
            return self._pull(stage, key)
        if not (problem := self.problem(stage, key)):
            with suppress(OSError):  # a read-only store can still be read
                os.utime(folder)
            return read_manifest(folder).ref
        try:
            self.discard(stage, key)
        except OSError as error:
            raise InputError(f"artifact {stage}/{key[:12]}: {problem}, and it cannot be removed") from error
        return self._pull(stage, key)

    def look(self, stage: str, key: str) -> ArtifactRef | None:
        """The reference of an artifact by its manifest alone, here or at the URL; no file is fetched or hashed."""
        name = f"{stage}/{key}/{MANIFEST}"
        with suppress(InputError, OSError):
            return read_manifest(self.folder(stage, key)).ref
        if self.remote and (content := remote.read(self.remote, name)) is not None:
            with suppress(InputError):
                return manifests.parse_manifest(content, name).ref
        return None

    def problem(self, stage: str, key: str, trust: bool = True) -> str | None:
        """Why an artifact's local folder is not what it should be, or None; `trust` lets known stamps spare hashing."""
        known = self._unwritten[key] if key in self._unwritten else manifests.read_stamps(self._stamps(key))
        problem, stamps = manifests.check(self.folder(stage, key), stage, key, known if trust else set())
        if stamps != known:
            self._remember(key, stamps)
        return problem

    def discard(self, stage: str, key: str) -> None:
        """Remove an artifact's local folder if it exists. It is renamed first, so that nobody finds half of it."""
        trash = self._new_folder(key)
        trash.parent.mkdir(exist_ok=True)
        self._remember(key, set())
        try:
            os.rename(self.folder(stage, key), trash)
        except (FileNotFoundError, NotADirectoryError):
            return  # another process removed it first, or it is only at the URL
        if trash.is_symlink():
            trash.unlink()
        else:
            shutil.rmtree(trash, ignore_errors=True)

    def open(self, ref: ArtifactRef) -> Path:
        """The folder of an artifact, verified; an `InputError` if it is missing, broken or not the one referred to."""
        stored = self.find(ref.stage, ref.key)
        if stored and stored.digest != ref.digest:  # made here, before another machine's was published
            stored = self._pull(ref.stage, ref.key) or stored
        named = f"artifact {ref.stage}/{ref.key[:12]}"
        if stored is None:
            raise InputError(f"{named}: missing from {self.root}; run its stage again")
        if stored.digest != ref.digest:
            raise InputError(f"{named}: digest {stored.digest[:12]}, expected {ref.digest[:12]}")
        folder = self.folder(ref.stage, ref.key)
        self._compare_libraries(read_manifest(folder))
        return folder

    def manifest(self, ref: ArtifactRef) -> Manifest:
        return read_manifest(self.open(ref))

    def _compare_libraries(self, manifest: Manifest) -> None:
        """Warn once of each library that the maker of an artifact had in another version; keys do not state these."""
        if new := manifests.other_versions(manifest.libraries) - self._warned:
            self._warned |= new
            warning = "%s %s was made with %s: give all machines the same versions, such as those of constraints.txt"
            log.warning(warning, manifest.stage, manifest.key[:12], ", ".join(sorted(new)))

    def _claimed(self, stage: str, key: str, check: Callable[[], None] | None) -> AbstractContextManager[Claim | None]:
        """What keeps other machines from the same work; nothing for a folder, where the lock suffices."""
        if not self.remote:
            return nullcontext()
        return claimed(self.remote, stage, key, self.lock(key), lambda: self._pull(stage, key), self.lease, check)

    def _publish(self, ref: ArtifactRef, claim: Claim | None) -> ArtifactRef:
        """Push a local artifact, unless another machine published one under its key first; return the one published."""
        if not self.remote or not claim:
            return ref
        while not (published := self._pull(ref.stage, ref.key)):
            if not claim.hold():
                continue
            if published := self._pull(ref.stage, ref.key, mend=True):  # before the claim was taken again
                break
            if remote.push(self.remote, self.folder(ref.stage, ref.key), ref, claim.is_lost):
                return ref
        return published

    def _pull(self, stage: str, key: str, mend: bool = False) -> ArtifactRef | None:
        """Copy the artifact at the URL, which all machines use, to the working copy; None if it is missing or broken.

        A local one that differs from it goes. With the claim, `mend` removes a broken one from the URL.
        """
        name, folder, target = f"{stage}/{key}/{MANIFEST}", self._new_folder(key), self.folder(stage, key)
        if not self.remote or (content := remote.read(self.remote, name)) is None:
            return None
        with suppress(InputError):  # there is none here, or none that is whole at the URL
            if (local := read_manifest(target)).digest == manifests.parse_manifest(content, name).digest:
                return local.ref
        try:
            problem, stamps = remote.fetch(self.remote, stage, key, content, folder)
            if problem:
                # Unless this machine has stalled, and another one has published meanwhile:
                if mend and remote.read(self.remote, name) == content:
                    remote.remove_files(self.remote, [name])
                return None
            ref = read_manifest(folder).ref
            while not _rename_new(folder, target):
                if read_manifest(target).digest == ref.digest:  # pulled by another process
                    return ref
                self.discard(stage, key)  # made here, but another machine's was published first
            self._remember(key, stamps)
            return ref
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _new_folder(self, key: str) -> Path:
        """A name for unfinished work, which nothing has yet."""
        return self.local / ".building" / f"{key}.{uuid.uuid4().hex[:8]}"

    def _stamps(self, key: str) -> Path:
        return self.local / ".verified" / key

    def _remember(self, key: str, stamps: set[str]) -> None:
        """Keep the stamps of an artifact's files instead of those known."""
        self._unwritten.pop(key, None)
        try:
            manifests.write_stamps(self._stamps(key), stamps)
        except OSError:
            self._unwritten[key] = stamps


def _rename_new(folder: Path, target: Path) -> bool:
    """Rename a folder to an unused name; False if another process took the name first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
