"""What a stage may read is in its key: inputs, settings, and nothing else; and runners give the same files."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import BaseModel

from helpers import save_worded_llama, worded_gguf, words, write_jsonl, write_own_benchmark
from pictures import blank_pictures
from tailored_llama.config import (
    ExecutionConfig,
    RunConfig,
    SmallestConfig,
    StoreConfig,
    SweepConfig,
    Work,
    build_config,
    validate_config,
)
from tailored_llama.pipeline import COMPOSITIONS, STAGES, Executor, FolderExecutor, Node, StoreExecutor, stages, steps
from tailored_llama.pipeline.graph import stage
from tailored_llama.store import MANIFEST, ArtifactRef, file_lock

SHOW_A_CONFIGURATION = {"report", "tailored", "sweep", "answer", "smallest"}
Calls = dict[str, list[Node]]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Calls:
    """The nodes of all compositions by stage, with their inputs made: all that the pipeline can do, and studies."""
    place = tmp_path_factory.mktemp("calls")
    text = place / "text.txt"
    text.write_text(words(2000, seed=2))
    own = write_own_benchmark(place)
    run: dict[str, Any] = {
        "benchmarks": [own, own | {"name": "shades"}],
        "model": {"source": str(save_worded_llama(place / "worded")), "dtype": "float32"},
        "calibration": {"source": str(text), "samples": 4, "tokens": 16},
        "pruning": {"ratios": [0.35], "min_channels": 4},
        "tuning": {"shots": 8, "held_out": 4, "epochs": 1},
        "perplexity": {"source": str(text), "window": 32, "tokens": 128},
        "store": {"root": str(place / "store"), "downloads": str(place / "downloads")},
    }
    whole = run | {
        "pruning": run["pruning"] | {"kinds": ["attention", "mlp", "vocabulary"], "vocabulary": 448},
        "store": run["store"] | {"export": str(place / "models"), "export_formats": ["gguf:f32"]},
    }
    plain = run | {"pruning": run["pruning"] | {"ratios": [0.2]}}
    configs: dict[str, Any] = {
        "tailor": validate_config(whole),
        "sweep": build_config(SweepConfig, plain | {"grid": [{"pruning.criterion": ["random"]}]}),
    }
    goal = {"lose_at_most": 90, "choosing_rows": 10, "types": ["q8_0"], "even_if_unprovable": True}
    rows = [{"question": f"{i}: the sky is", "a": "blue", "b": "red", "answer": "ab"[i % 2]} for i in range(150)]
    configs["smallest"] = build_config(
        SmallestConfig,
        run
        | {"benchmarks": [write_jsonl(place / "job.jsonl", rows)], "goal": goal | {"smallest": "writing"}}
        | {"pruning": {"ratios": [0.4]}, "store": run["store"] | {"export": str(place / "smallest")}}
        | {"model": {"source": str(worded_gguf(place)), "dtype": "float32"}},
    )
    calls: Calls = {name: [] for name in STAGES}
    with blank_pictures():
        for name, config in configs.items():
            run = StoreExecutor(config.store, config.execution)
            COMPOSITIONS[name].make(run, config)
            for node in run.begun():
                calls[node.stage.name].append(run.ready(node))
    adapter = next(call for call in calls["adapter"] if call.inputs["pruned"].stage == "dense")
    made: dict[str, Any] = {"dense": adapter.inputs["pruned"], "trimmed": adapter.inputs["pruned"]}
    calls["carried"].append(run.ready(stages.carried("carry", adapter=adapter, **made)))
    calls["tokenizer"].append(run.ready(stages.tokenizer("read", gguf=calls["gguf"][0])))
    return calls


def parts(kind: Any, seen: set[Any] | None = None) -> set[Any]:
    """A type with all the types that its values have parts of."""
    seen = set() if seen is None else seen
    for argument in get_args(kind):
        parts(argument, seen)
    if isinstance(kind, type) and kind not in seen:
        seen.add(kind)
        if is_dataclass(kind) or issubclass(kind, BaseModel):
            for part in get_type_hints(kind).values():
                parts(part, seen)
    return seen


def configurations(kind: Any) -> list[type]:
    return [part for part in parts(kind) if issubclass(part, RunConfig)]


@pytest.mark.parametrize("name", STAGES)
def test_a_function_takes_inputs_settings_and_work_and_nothing_else(calls: Calls, name: str) -> None:
    function, settings = STAGES[name].load(), STAGES[name].settings
    assert calls[name]
    for call in calls[name]:
        assert inspect.signature(function).parameters.keys() == {*STAGES[name].parameters, "work"}
        assert call.inputs.keys() <= STAGES[name].parameters.keys()
    types = get_type_hints(function)
    assert (types.pop("settings"), types.pop("work")) == (settings, Work)
    types.pop("return")
    for parameter, kind in types.items():
        assert not [part for part in parts(kind) if issubclass(part, BaseModel)], f"{parameter} is no artifact"


def test_what_a_stage_works_with_cannot_change_what_it_writes() -> None:
    assert [field.name for field in fields(Work)] == ["out", "execution", "downloads", "progress", "resume"]


@pytest.mark.parametrize("name", STAGES)
def test_settings_are_frozen_and_only_reports_have_a_whole_configuration_in_them(calls: Calls, name: str) -> None:
    kind: Any = STAGES[name].settings
    assert kind is NoneType or (is_dataclass(kind) and kind.__dataclass_params__.frozen)  # type: ignore[attr-defined]
    assert bool(configurations(kind)) == (name in SHOW_A_CONFIGURATION)
    for shown in [call.settings.config for call in calls[name] if name in SHOW_A_CONFIGURATION]:
        assert (shown.execution, shown.store) == (ExecutionConfig(), StoreConfig())


@dataclass(frozen=True)
class Other:
    """What counts by another identity than a value's own."""

    value: Any

    def identity(self) -> dict[str, Any]:
        return {"other than": self.value.identity()}


def changes(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """A value with each of its leaves changed in turn; each with the place of the leaf."""
    if hasattr(value, "identity"):
        yield place, Other(value)
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            for at, changed in changes(getattr(value, name), f"{place}.{name}"):
                yield at, value.model_copy(update={name: changed})
    elif is_dataclass(value):
        for field in fields(value):
            for at, changed in changes(getattr(value, field.name), f"{place}.{field.name}"):
                yield at, replace(value, **{field.name: changed})  # type: ignore[type-var]
    elif isinstance(value, Mapping):
        yield f"{place}, another", {**value, "another": 1}
        for name, part in value.items():
            yield from ((at, {**value, name: changed}) for at, changed in changes(part, f"{place}.{name}"))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield f"{place}, another", (*value, 1)
        for i, part in enumerate(value):
            for at, changed in changes(part, f"{place}.{i}"):
                yield at, (*value[:i], changed, *value[i + 1 :])
    elif isinstance(value, bool):
        yield place, not value
    else:
        yield place, value + 1 if isinstance(value, int | float) else f"{value}, changed"


@pytest.mark.parametrize("name", STAGES)
def test_every_setting_and_every_input_is_in_the_key(calls: Calls, name: str) -> None:
    for key, call in {call.key: call for call in calls[name]}.items():
        changed = list(changes(call.settings)) if call.settings is not None else []
        assert bool(changed) == (STAGES[name].settings is not NoneType)
        for place, settings in changed:
            assert replace(call, settings=settings).key != key, place
        for label, reference in call.references.items():
            assert with_other(call, reference).key != key, label
        assert replace(call, name="shown in another way").key == key


def with_other(node: Node, reference: ArtifactRef) -> Node:
    """A node with another artifact in the place of one of its inputs."""
    return node.with_inputs(lambda leaf: replace(leaf, digest="0" * 64) if leaf == reference else leaf)


def test_a_pruned_checkpoint_is_the_same_in_a_folder_and_in_a_store(own_run: dict[str, Any], tmp_path: Path) -> None:
    config = validate_config(own_run)
    (tmp_path / "scratch").mkdir()

    def pruned(run: Executor) -> dict[str, bytes]:
        prompts = steps.render_all(config)
        dense = steps.prepare_dense(config, prompts)
        folder = run.open(steps.prune_to(config, dense, 0.2, prompts))
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}

    stored = pruned(StoreExecutor(config.store, config.execution))
    assert "model.safetensors" in stored
    assert pruned(FolderExecutor(tmp_path / "scratch", config.store.downloads, config.execution)) == stored


def test_a_command_on_folders_has_its_device_to_itself(tmp_path: Path) -> None:
    """As a night's run has: else the two share a GPU's memory, and one of them runs out of it."""
    locks, free = tmp_path / "downloads" / ".slots", list[bool]()

    def function(*, settings: None, work: Work) -> None:
        with file_lock(locks / "cpu", wait=False) as held:
            free.append(held)

    run = FolderExecutor(tmp_path, str(locks.parent), ExecutionConfig(device="cpu", exclusive="always"))

    @stage("probe", 1, lambda: function, on_device=True)
    def probe(*, settings: None = None) -> None: ...

    run.open(probe("probe"))
    assert free == [False]
