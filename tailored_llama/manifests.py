"""Manifests: what an artifact says of itself, and the key that names all its bytes depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tailored_llama.errors import InputError
from tailored_llama.files import is_safe_relative

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ArtifactRef:
    """What passes between stages: where an artifact is (stage, key), and what is in it (digest)."""

    stage: str
    key: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself: how it was made, its files, and what making it cost."""

    stage: str
    version: int
    key: str
    config: dict[str, Any]
    inputs: dict[str, ArtifactRef]
    files: dict[str, dict[str, Any]]  # relative name → {"sha256": hex, "size": bytes}
    libraries: dict[str, str]
    seconds: float
    peak_memory_bytes: int
    measured: dict[str, Any]  # facts that differ between runs (tokens/s …): never part of a file

    @property
    def digest(self) -> str:
        return _digest({name: entry["sha256"] for name, entry in self.files.items()})

    @property
    def ref(self) -> ArtifactRef:
        return ArtifactRef(self.stage, self.key, self.digest)


def artifact_key(stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, ArtifactRef]) -> str:
    """SHA-256 over the stage, its version, the configuration it reads and the digests of its inputs."""
    return _digest(
        {
            "stage": stage,
            "version": version,
            "config": dict(config),
            "inputs": {name: ref.digest for name, ref in inputs.items()},
        }
    )


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        InputError: it is missing or not a manifest, or names a file outside its folder.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, shown: str) -> Manifest:
    """A manifest from its file's bytes; `shown` is where it lies.

    Raises:
        InputError: as `read_manifest`.
    """
    try:
        data = json.loads(content.decode())
        inputs = {name: ArtifactRef(**ref) for name, ref in data["inputs"].items()}
        files = {name: {"sha256": entry["sha256"], "size": entry["size"]} for name, entry in data["files"].items()}
        manifest = Manifest(
            **{
                **data,
                "config": {**data["config"]},
                "libraries": {**data["libraries"]},
                "measured": {**data["measured"]},
                "seconds": float(data["seconds"]),
                "peak_memory_bytes": int(data["peak_memory_bytes"]),
                "inputs": inputs,
                "files": files,
            }
        )
        outside = not all(is_safe_relative(name) for name in files)
        nested = any(str(above) in files for name in files for above in PurePosixPath(name).parents)
        texts = (
            manifest.stage,
            manifest.key,
            *(t for ref in inputs.values() for t in (ref.stage, ref.key, ref.digest)),
        )
        if nested or MANIFEST in files or not all(isinstance(text, str) for text in texts):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{shown}: not a manifest ({type(error).__name__})") from None
    if outside:
        raise InputError(f"{shown}: names a file outside its folder")
    return manifest


def check_identity(manifest: Manifest, stage: str, key: str) -> str | None:
    """Whether a manifest is of the artifact in whose place it lies: what is wrong, if anything."""
    if (manifest.stage, manifest.key) != (stage, key):
        return f"manifest of {manifest.stage}/{manifest.key[:12]}"
    if artifact_key(stage, manifest.version, manifest.config, manifest.inputs) != key:
        return "its key does not follow from its manifest"
    return None


def links_or_strangers(folder: Path, manifest: Manifest) -> str | None:
    """A link, or a file that the manifest does not name: what a loader would follow, or take for the artifact's."""
    if folder.is_symlink():
        return "is a symbolic link"
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place, name)
            relative = str(path.relative_to(folder))
            if path.is_symlink():
                return f"{relative} is a symbolic link"
            if name in names and relative not in manifest.files and relative != MANIFEST and not name.startswith("."):
                return f"{relative} is not in its manifest"
    return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
