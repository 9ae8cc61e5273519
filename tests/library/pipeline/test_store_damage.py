"""Every kind of artifact, damaged in every way: found out on open, built again by the pipeline, never used."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compositions import compose
from helpers import save_tiny_llama, write_own_benchmark
from tailored_llama.config import RunConfig, validate_config
from tailored_llama.errors import InputError
from tailored_llama.pipeline import STAGES
from tailored_llama.store import MANIFEST, ArtifactStore, read_manifest, verify

MADE = (  # by the run below
    "adapter", "answers", "calibration", "dense", "examples", "groups", "importance", "perplexity", "prompts",
    "pruned", "reach", "report", "scores", "split", "tailored", "tokens",
)  # fmt: skip
STUDIES = (  # by other runs: the store treats stand-ins alike
    "answer", "carried", "gguf", "quantised-scores", "served-scores", "smallest", "source", "speed", "sweep",
    "tokenizer",
)  # fmt: skip
KINDS = (*MADE, *STUDIES)
Damage = Callable[[Path, Path], Any]


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST), key=lambda p: p.stat().st_size)


def truncate(folder: Path, other: Path) -> None:
    content = largest(folder).read_bytes()
    largest(folder).write_bytes(content[: len(content) // 2])


def flip(folder: Path, other: Path) -> None:
    content = bytearray(largest(folder).read_bytes())
    content[len(content) // 2] ^= 1
    largest(folder).write_bytes(content)


def take_files(folder: Path, other: Path) -> None:
    """The other's files under this one's manifest."""
    manifest = (folder / MANIFEST).read_bytes()
    take_all(folder, other)
    (folder / MANIFEST).write_bytes(manifest)


def take_all(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


DAMAGES: dict[str, Damage] = {
    "deleted": lambda folder, other: shutil.rmtree(folder),
    "a file deleted": lambda folder, other: largest(folder).unlink(),
    "truncated": truncate,
    "bit flipped": flip,
    "another's files": take_files,
    "another's files and manifest": take_all,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A whole run with all that there is: its configuration."""
    place = tmp_path_factory.mktemp("made")
    (place / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    text = str(place / "text.txt")
    config = validate_config(
        {
            "benchmarks": [write_own_benchmark(place)],
            "model": {"source": str(save_tiny_llama(place / "tiny")), "dtype": "float32"},
            "calibration": {"source": text, "samples": 4, "tokens": 16},
            "pruning": {"ratios": [0.2], "min_channels": 4},
            "tuning": {"shots": 8, "held_out": 4, "epochs": 2, "learning_rate": 1e-2},
            "perplexity": {"source": text, "window": 32, "tokens": 128},
            "store": {
                "root": str(place / "store"),
                "downloads": str(place / "downloads"),
                "export": str(place / "models"),
            },
        }
    )
    compose("tailor", config)
    return config


def folders(root: str | Path) -> dict[str, list[Path]]:
    """By kind, the folders of its artifacts."""
    found: dict[str, list[Path]] = {}
    for folder in sorted(Path(root).glob("[!.]*/*")):
        found.setdefault(folder.parent.name, []).append(folder)
    return found


def other_than(folder: Path, root: Path) -> Path:
    """Another artifact, of the same kind where there is one."""
    same = [path for path in folder.parent.iterdir() if path != folder]
    return sorted(same)[0] if same else next(path for path in sorted(root.glob("[!.]*/*")) if path != folder)


def test_every_kind_is_here(made: RunConfig) -> None:
    assert sorted(folders(made.store.root)) == sorted(MADE)
    assert set(KINDS) == STAGES.keys()


def stand_in(root: Path, kind: str) -> None:
    """Publish an artifact of a kind, made of the first report there."""
    report = read_manifest(folders(root)["report"][0]).ref
    ArtifactStore(str(root)).build(
        kind, 1, {}, {"report": report}, lambda out: (out / "rows.txt").write_text(kind) and None
    )


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_artifact_is_refused_on_open(made: RunConfig, tmp_path: Path, kind: str, damage: Damage) -> None:
    root = Path(shutil.copytree(made.store.root, tmp_path / "store"))
    if kind in STUDIES:
        stand_in(root, kind)
    folder = folders(root)[kind][0]
    ref = read_manifest(folder).ref
    assert ArtifactStore(str(root)).open(ref) == folder
    damage(folder, other_than(folder, root))
    with pytest.raises(InputError, match=rf"^artifact {kind}/{ref.key[:12]}: missing from .*; run its stage again$"):
        ArtifactStore(str(root)).open(ref)
    assert not folder.exists()


@pytest.mark.usefixtures("all_general_words")  # as the fixture that built the store
def test_the_pipeline_builds_what_is_damaged_again_and_ends_with_the_same_bytes(
    made: RunConfig, tmp_path: Path
) -> None:
    """One of every kind it made at once, each in another way: every stage meets damage in what it reads and wrote."""
    root = Path(shutil.copytree(made.store.root, tmp_path / "store"))
    intact = Path(shutil.copytree(root, tmp_path / "intact"))
    for kind, damage in zip(MADE, itertools.cycle(DAMAGES.values()), strict=False):
        folder = folders(root)[kind][0]
        damage(folder, other_than(intact / folder.relative_to(root), intact))
    store = made.store.model_copy(update={"root": str(root), "export": str(tmp_path / "models")})
    compose("tailor", made.model_copy(update={"store": store}))
    before, after = contents(intact), contents(root)
    assert after.keys() == before.keys()
    assert {place.parts[0] for place in before if after[place] != before[place]} <= {"report"}  # what stages took
    assert {problem for _, problem in verify(ArtifactStore(str(root)))} == {None}


def contents(root: Path) -> dict[Path, Any]:
    """By place, the digests of an artifact's files."""
    paths = root.glob("[!.]*/*/manifest.json")
    return {path.parent.relative_to(root): json.loads(path.read_text())["files"] for path in paths}
