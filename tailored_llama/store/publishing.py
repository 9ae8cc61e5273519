"""Artifacts where people find them: in folders with names, and models published there or in a Hub repository.

A repository, hf://user/name, holds one model at a time, as a folder does. Its history keeps the earlier ones.
"""

import ctypes
import filecmp
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tailored_llama.errors import InputError
from tailored_llama.store.downloads import at_hub
from tailored_llama.store.files import file_lock
from tailored_llama.store.manifests import ANSWER, read_manifest

HUB = "hf://"
_FIELD = "store.publish"
_OF_A_NEW_REPOSITORY = {".gitattributes", "README.md"}


def check_target(target: Path, field: str, what: str, stages: Sequence[str]) -> None:
    """Refuse a folder that is neither new nor an artifact of some stages; `field` asks for `what`, say "a report"."""
    if not target.exists():
        return
    try:
        stage = read_manifest(target).stage
    except InputError:
        stage = ""
    if stage not in stages:
        raise InputError(f"{field}: {target} is not {what}; allowed: a new folder, or one to replace")


def place(artifact: Path, target: Path, field: str, what: str, stages: Sequence[str]) -> None:
    """Copy an artifact to a folder that passes `check_target`; another or a damaged copy is replaced in one step.

    Whatever fails, and wherever the process is killed, the old copy or the new one stands whole at the target. Some
    file systems, such as NFS, cannot exchange two folders. There a kill between two renames leaves no target; the old
    copy is kept beside it, and the next call puts it back. A call also removes what killed ones left, and waits for
    another process that has the same target.
    """
    lock, scratch = target.parent / f".{target.name}.lock", _scratch(target)
    try:
        with file_lock(lock):
            try:
                _clear(scratch, target)
                check_target(target, field, what, stages)
                if target.exists() and _is_copy(target, artifact):
                    return
                new = shutil.copytree(artifact, scratch / "new")
                try:
                    _exchange(new, target)
                except (OSError, AttributeError):  # also where there is no target yet
                    with suppress(FileNotFoundError):
                        target.rename(scratch / "old")
                    new.rename(target)
            finally:
                _clear(scratch, target)
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{field}: {target}: {error}; allowed: a writable folder with room") from None


def _is_copy(target: Path, artifact: Path) -> bool:
    """Whether all files of an artifact stand at a target; those of the same size and time are not read."""
    manifest = read_manifest(artifact)
    if read_manifest(target).digest != manifest.digest:
        return False
    _, *differing = filecmp.cmpfiles(target, artifact, list(manifest.files))
    return not any(differing)


def _scratch(target: Path) -> Path:
    return target.parent / f".{target.name}.replacing"


def _clear(scratch: Path, target: Path) -> None:
    """Put back the old copy if nothing has replaced it, and remove all else that is unfinished."""
    if (old := scratch / "old").is_dir() and not target.exists():
        old.rename(target)
    shutil.rmtree(scratch, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    """Exchange two folders in one step. OSError: they or the file system cannot; AttributeError: glibc before 2.28."""
    here, exchange = -100, 2  # Linux: AT_FDCWD and RENAME_EXCHANGE
    if ctypes.CDLL(None).renameat2(here, os.fsencode(new), here, os.fsencode(old), exchange):
        raise OSError


def check_published(target: str) -> None:
    """Refuse, before a run, a folder that may not be replaced, or a repository without a token of the Hub."""
    if not target.startswith(HUB):
        return check_target(Path(target).expanduser(), _FIELD, "a published model", [ANSWER])
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError(f"{_FIELD}: got {target!r} without a token for the Hub; allowed: with HF_TOKEN set")


def published_file(target: str, name: str) -> bytes | None:
    """A file of the model that is published at a target; None if none is. Something else there is refused."""
    repository = target.removeprefix(HUB)
    if repository == target:
        folder = Path(target).expanduser()
        file = (folder if folder.exists() else _scratch(folder) / "old") / name  # see `place`
        present = {path.name for path in file.parent.iterdir()} if file.parent.is_dir() else set()
    else:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        with at_hub(f"{_FIELD} {target}: cannot be read"):
            try:
                present = set(HfApi().list_repo_files(repository))
            except RepositoryNotFoundError:  # it is created when a model is published
                present = set()
            if name in present:
                file = Path(HfApi().hf_hub_download(repository, name))
    if name in present:
        return file.read_bytes()
    if present - _OF_A_NEW_REPOSITORY:
        raise InputError(f"{_FIELD}: {target} is not a published model; allowed: a new place, or one to replace")
    return None


def publish(model: Path, target: str, message: str) -> None:
    """Publish an artifact in the place of what is there, whole or not at all; a new repository is private."""
    repository = target.removeprefix(HUB)
    if repository == target:
        return place(model, Path(target).expanduser(), _FIELD, "a published model", [ANSWER])
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    new = {path.name: path for path in model.iterdir()}
    with at_hub(f"{_FIELD} {target}: cannot be published"):
        HfApi().create_repo(repository, private=True, exist_ok=True)
        gone = set(HfApi().list_repo_files(repository)) - new.keys() - {".gitattributes"}
        adds = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in new.items()]
        deletes = [CommitOperationDelete(path_in_repo=name) for name in sorted(gone)]
        # One commit: `upload_folder` makes several of an upload that takes minutes.
        HfApi().create_commit(repository, [*adds, *deletes], commit_message=message)
