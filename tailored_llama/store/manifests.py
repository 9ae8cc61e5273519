"""Manifests, the records of artifacts, and the key over everything an artifact's bytes depend on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from tailored_llama.errors import InputError
from tailored_llama.store.files import is_safe_relative, walk

MANIFEST = "manifest.json"
# Stages of finished models, which may be exported and replaced.
FINISHED, GGUF, ANSWER = "tailored", "gguf", "answer"
_LIBRARIES = ("torch", "transformers", "peft", "torch-pruning", "datasets", "pyarrow", "tailored-llama")


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

    @property
    def digest(self) -> str:
        return _digest({name: entry["sha256"] for name, entry in self.files.items()})

    @property
    def ref(self) -> ArtifactRef:
        return ArtifactRef(self.stage, self.key, self.digest)


@cache
def installed_versions() -> dict[str, str]:
    """The installed version of each library that may change an artifact."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def other_versions(recorded: Mapping[str, str]) -> set[tuple[str, str, str]]:
    """Libraries that were recorded in another version than is installed: name, recorded version, installed version.

    Build tags do not count, such as torch's +cpu.
    """
    pairs = {(name, version, installed_versions().get(name, "")) for name, version in recorded.items()}
    return {pair for pair in pairs if pair[1].partition("+")[0] != pair[2].partition("+")[0]}


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
    return parse_manifest(path.read_bytes() if path.is_file() else b"", str(path))


def parse_manifest(content: bytes, location: str) -> Manifest:
    """Parse a manifest from its bytes; `location` is its path in error messages.

    Raises:
        InputError: as `read_manifest`.
    """
    try:
        data = json.loads(content.decode())
        inputs = {name: ArtifactRef(**ref) for name, ref in data["inputs"].items()}
        files = {name: {"sha256": entry["sha256"], "size": entry["size"]} for name, entry in data["files"].items()}
        tables = {name: {**data[name]} for name in ("config", "libraries", "measured")}
        costs = {"seconds": float(data["seconds"]), "peak_memory_bytes": int(data["peak_memory_bytes"])}
        manifest = Manifest(**data | tables | costs | {"inputs": inputs, "files": files})
        outside = not all(is_safe_relative(name) for name in files)
        nested = any(str(parent) in files for name in files for parent in PurePosixPath(name).parents)
        texts = [manifest.stage, manifest.key, *(text for ref in inputs.values() for text in astuple(ref))]
        if nested or MANIFEST in files or not all(isinstance(text, str) for text in texts):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{location}: not a manifest ({type(error).__name__})") from None
    if outside:
        raise InputError(f"{location}: names a file outside its folder")
    return manifest


def check_identity(manifest: Manifest, stage: str, key: str) -> None:
    """Check that a manifest belongs to the artifact in whose folder it is.

    Raises:
        InputError: it does not.
    """
    if (manifest.stage, manifest.key) != (stage, key):
        raise InputError(f"manifest of {manifest.stage}/{manifest.key[:12]}")
    if artifact_key(stage, manifest.version, manifest.config, manifest.inputs) != key:
        raise InputError("its key does not follow from its manifest")


def size_problem(manifest: Manifest, sizes: Mapping[str, int]) -> str | None:
    """The first file of a manifest that is missing or has another size in bytes, or None."""
    for name, entry in manifest.files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != entry["size"]:
            return f"{name} has {sizes[name]} bytes, expected {entry['size']}"
    return None


def links_or_strangers(folder: Path, manifest: Manifest) -> str | None:
    """The first symbolic link or unlisted file, or None: a loader could follow the one and read the other."""
    if folder.is_symlink():
        return "is a symbolic link"
    for parent, folders, names in walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            relative = str(path.relative_to(folder))
            if path.is_symlink():
                return f"{relative} is a symbolic link"
            if name in names and relative not in manifest.files and relative != MANIFEST and not name.startswith("."):
                return f"{relative} is not in its manifest"
    return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
