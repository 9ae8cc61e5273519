"""A store that an earlier version filled is found whole: the keys of every stage are those recorded then.

`recorded_keys.json` has, for each run and stage, how many artifacts there are, and a digest of their keys, as they were
when a version was last raised on purpose; `quickstart-1dcd201.toml` and `recovery-0e51455.toml` are configurations of
earlier commits. The pages (report, sweep, transfer, prompt-study) may change and are left out. Where a stage's version
is raised on purpose, record its keys anew:
`PYTHONPATH=. python tests/flows/test_recorded_keys.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
from prefect import State, Task

from flows import prompts, sweep, tailor, transfer
from flows.__main__ import load
from tailored_llama.store import ArtifactRef, ArtifactStore, artifact_key
from tailored_llama.store.housekeeping import REPORTS

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).with_name("recorded_keys.json")
COMMANDS = {"tailor": tailor, "sweep": sweep, "transfer": transfer, "prompts": prompts}
COMMIT = "1" * 40
OLD_QUICKSTART = "../tests/flows/quickstart-1dcd201.toml"
OLD_RECOVERY = "../tests/flows/recovery-0e51455.toml"
VARIANTS = {
    "data-free": ["pruning.criterion=random", "reconstruction.method=none"],
    "magnitude, bias": ["pruning.criterion=magnitude_l2", "reconstruction.method=bias"],
    "flap, static, steps": [
        "pruning.criterion=flap",
        "reconstruction.method=static",
        "pruning.steps=2",
        "pruning.ratios=[0.2, 0.5]",
    ],
    "prompts as text": ["calibration.source=prompts"],
    "healing, distillation, ranking": [
        "healing.tokens=65536",
        "distillation.weight=1.0",
        "tuning.ranking=0.5",
        "tuning.variant=dora",
    ],
    "mixture, prefix": [
        "tuning.examples=mixture",
        "tuning.variant=prefix",
        "distillation.weight=1.0",
        "distillation.sequences=0",
    ],
    "untuned, no held out": ["tuning.examples=none", "tuning.held_out=0"],
    "few-shot, task": [
        "scoring.num_fewshot=5",
        "prompts.template=task",
        "seed=3",
        "tuning.held_out=0",
        "perplexity.stride=128",
    ],
    "written": [
        'benchmarks=[{name = "capitals", train = "my-task/train.csv", evaluation = "my-task/evaluation.csv", '
        'context = "question", answer = "answer", metric = "f1", stop = [";"]}]'
    ],
    "hub": [
        "model.source=owner/name",
        f'benchmarks=[{{name="piqa", source="ybisk/piqa", revision="{COMMIT}", train="train", '
        'evaluation="validation"}]',
        "calibration.source=Salesforce/wikitext",
        "calibration.subset=wikitext-2-raw-v1",
        "calibration.column=text",
    ],
}
RUNS: dict[str, tuple[str, str, list[str]]] = {
    **{file: ("tailor", file, []) for file in ("own-task.toml", "paper.toml")},
    **{
        file: ("sweep", file, [])
        for file in ("sweep.toml", "recovery-small.toml", "shots.toml", "models.toml", "soft-prompts.toml")
    },
    "recovery.toml": ("sweep", OLD_RECOVERY, []),
    "recovery.toml, as shipped now": ("sweep", "recovery.toml", []),
    "transfer.toml": ("transfer", "transfer.toml", []),
    "prompts-study.toml": ("prompts", "prompts-study.toml", []),
    "prompts-study.toml pruned": ("prompts", "prompts-study.toml", ["pruned=true"]),
    "quickstart.toml": ("tailor", OLD_QUICKSTART, []),
    "quickstart.toml, as shipped now": ("tailor", "quickstart.toml", ["model.dtype=float32"]),
    **{f"quickstart.toml, {name}": ("tailor", OLD_QUICKSTART, changes) for name, changes in VARIANTS.items()},
}

Keys = dict[str, list[Any]]  # stage → number of artifacts, digest of their keys


def keys_of(name: str, folder: Path) -> Keys:
    """Run a flow whose stages only note their keys; each artifact's digest is its key."""
    flow, file, changes = RUNS[name]
    made: dict[str, set[str]] = {}

    def build(
        store: Any, stage: str, version: int, fields: Mapping[str, Any], inputs: Mapping[str, ArtifactRef], make: Any
    ) -> tuple[ArtifactRef, bool]:
        key = artifact_key(stage, version, json.loads(json.dumps(dict(fields))), inputs)
        made.setdefault(stage, set()).add(key)
        return ArtifactRef(stage, key, key), False

    (folder / "my-task").mkdir()
    for split in ("train", "evaluation"):
        (folder / "my-task" / f"{split}.csv").write_text(f"question,a,b,c,d,e,answer\n{split}?,v,w,x,y,z,A\n")
    command = COMMANDS[flow].COMMAND
    with ExitStack() as stack:
        for change in _noting(build):
            stack.enter_context(change)
        command.flow.fn(load(flow, str(ROOT / "data" / file), [*changes, "execution.device=cpu"]))
    return {
        stage: [len(keys), hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:16]]
        for stage, keys in sorted(made.items())
        if stage not in REPORTS
    }


def _noting(build: Any) -> Iterator[Any]:
    """Patches: no server, no artifact, and fixed answers for what a flow reads of one."""

    def call(task: Task[Any, Any], *arguments: Any, **named: Any) -> Any:
        result = task.fn(*arguments, **named)
        return result if isinstance(result, State) else SimpleNamespace(result=lambda: result)

    manifest = SimpleNamespace(measured={}, seconds=0.0, peak_memory_bytes=0)
    yield patch.object(Task, "__call__", call)
    yield patch.object(ArtifactStore, "build", build)
    yield patch.object(ArtifactStore, "open", lambda store, ref: Path(ref.stage) / ref.key)
    yield patch.object(ArtifactStore, "manifest", lambda store, ref: manifest)
    yield patch("tasks.prune.read_structure", lambda folder: SimpleNamespace(parameters=134_515_008))
    yield patch("tasks.build_graph.check_ratio", lambda *arguments: None)
    yield patch("tasks.prompt_study.choose", lambda scores: next(iter(scores)))
    yield patch("tasks.export.tailored_card", lambda *arguments: "card")
    yield patch("tasks.export.place", lambda *arguments: None)
    for name in ("results", "run_results", "base_of", "read_comparison"):
        yield patch(f"tasks.export.{name}", lambda *arguments: None)
    for name in ("store.downloads", "models.convert", "data.texts", "data.splits"):
        yield patch(f"tailored_llama.{name}.hub_commit", lambda source, revision, kind: revision or "0" * 40)
    for name in ("report", "sweep", "transfer", "prompt_study"):
        yield patch(f"tasks.{name}.show_report", lambda *arguments: None)
    for name in ("_stage", "prompt_study", "export"):
        yield patch(f"tasks.{name}.get_run_logger", MagicMock())
    yield patch("flows._outcome.get_run_logger", MagicMock())


@pytest.mark.parametrize("name", RUNS)
def test_keys_are_those_recorded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert keys_of(name, tmp_path) == json.loads(RECORDED.read_text())[name]


if __name__ == "__main__":
    import os
    import tempfile

    recorded = {}
    for run in RUNS:
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)
            recorded[run] = keys_of(run, Path(scratch))
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
