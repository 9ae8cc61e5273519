"""Finished models: the card of a tailored checkpoint, and its place where the user looks for it."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from tailored_llama import sources
from tailored_llama.benchmarks import Example
from tailored_llama.cards import Base, is_layered, loading, what_was_removed, write_card
from tailored_llama.checkpoints import read_config
from tailored_llama.config import SOFT, BenchmarkConfig, RunConfig, TextConfig
from tailored_llama.errors import InputError
from tailored_llama.healing import healing_text
from tailored_llama.manifests import read_manifest
from tailored_llama.own import is_written, named_columns
from tailored_llama.prompts import render
from tailored_llama.recovery import ReportInputs, recovery_rows
from tailored_llama.report_parts import page_template, settings_of, span
from tailored_llama.report_text import benchmark_notes, gained_by, plus_minus, summary
from tailored_llama.seven import BUILTIN
from tailored_llama.templates import GENERIC, load_template

STAGE = "tailored"  # whose artifacts may be exported, and replaced


def export_folders(config: RunConfig) -> dict[tuple[float, str], Path]:
    """Where each finished model goes, by ratio and benchmark; empty where none is asked for."""
    if config.store.export is None:
        return {}
    folder = Path(config.store.export).expanduser()
    pairs = [(ratio, own.name) for ratio in config.pruning.ratios for own in config.benchmarks]
    return {(ratio, name): folder / f"{name}-{ratio:g}" for ratio, name in pairs}


def check_mergeable(config: RunConfig) -> None:
    """Check that a run makes adapters that can be merged, where finished models are asked for.

    Raises:
        InputError: it makes none, or soft prompts.
    """
    tuning = config.tuning
    if config.store.export and (tuning.examples == "none" or tuning.variant in SOFT):
        field = "examples" if tuning.examples == "none" else "variant"
        raise InputError(
            f"store.export: got {config.store.export!r} with tuning.{field} = {getattr(tuning, field)!r}; allowed: an "
            "adapter that merges into weights (tuning.variant lora, rslora or dora), or no store.export"
        )


def check_target(target: Path) -> None:
    """Check that a place is free, or holds a finished model, which may be replaced.

    Raises:
        InputError: something else stands there.
    """
    if not target.exists():
        return
    try:
        stage = read_manifest(target).stage
    except InputError:
        stage = ""
    if stage != STAGE:
        raise InputError(f"store.export: {target} is not an exported model; allowed: a free place, or one to replace")


def place(artifact: Path, target: Path) -> None:
    """Copy a finished model to where the user looks for it, whole or not at all; an earlier export is replaced.

    Raises:
        InputError: something else stands there, or there is no room.
    """
    check_target(target)
    if target.exists() and read_manifest(target).digest == read_manifest(artifact).digest:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            new = shutil.copytree(artifact, Path(scratch) / "new")
            if target.exists():
                target.rename(Path(scratch) / "old")
            new.rename(target)
    except OSError as error:
        raise InputError(f"store.export: {target}: {error}; allowed: a writable folder with room") from None


def tailored_card(inputs: ReportInputs, own: BenchmarkConfig, base: Base, checkpoint: Path) -> str:
    """The model card of a merged checkpoint, from the scores and settings that the report is made of.

    Args:
        inputs: the dense model and one run, with the scores of one benchmark.
        own: that benchmark.
        base: what everything started from.
        checkpoint: the pruned checkpoint, whose layout and type the merged one has.

    Raises:
        InputError: as `recovery.recovery_rows`.
    """
    (row,) = recovery_rows(inputs)
    config, ratio, total, left = inputs.config, row.ratio, row.dense_parameters, row.pruned_parameters
    if config is None or ratio is None or total is None or left is None or row.tailored is None:
        raise ValueError("a model card needs the run's configuration, its ratio, both sizes and the tailored score")
    body = page_template("card.md.j2").render(
        base=base,
        config=config,
        data=_data(own),
        gained_by=gained_by(config),
        healed_tokens=healing_text(config).calibration.samples * config.calibration.tokens,
        dtype=read_config(checkpoint).get("dtype", "float32"),
        layered=is_layered(checkpoint),
        loading=loading(checkpoint),
        notes=benchmark_notes([row]),
        own=own,
        plus_minus=plus_minus,
        prompt=_prompt(config, own),
        removed=" ".join(what_was_removed(total, left, config.pruning, config.reconstruction).split()),
        row=row,
        settings=_settings(config, own, ratio),
        span=span,
        summary=summary(inputs, [row]),
        text=_text,
        version=importlib.metadata.version("tailored-llama"),
        written=is_written(own),
    )
    result = EvalResult(
        task_type="text-generation",
        dataset_type=own.name,
        dataset_name=own.name,
        metric_type=str(row.metric),
        metric_value=round(row.tailored, 4),
        metric_name=f"{row.metric}, {row.examples} examples, standard error {row.tailored_stderr:.4f}",
    )
    name = f"{own.name}-{ratio:g}"
    return write_card(
        f"{name}, made from {base.name}",
        [body.strip()],
        base_model=base.hub,
        **base.licence,
        tags=["tailored-llama", "pruned", "arxiv:2410.19185"],
        model_name=name,
        eval_results=[result],
    )


def _data(own: BenchmarkConfig) -> str:
    """Where the examples are from."""
    if own.source:
        subset, revision = own.subset or "default", own.revision or "main"
        return f"the Hub data set `{own.source}` ({subset}, revision {revision})"
    if own.train and own.evaluation:
        return f"`{Path(own.train).name}` to tune on, `{Path(own.evaluation).name}` to score"
    wheel = sources.DATA_WHEEL
    return f"train and evaluation split, as in the PyPI wheel {wheel.name}=={wheel.version}"


def _text(text: TextConfig) -> str:
    return f"`{_without_folder(text.source)}`"


def _prompt(config: RunConfig, own: BenchmarkConfig) -> str:
    """The prompt with the columns' names in braces where an example's texts will stand."""
    if own.name in BUILTIN:
        fields = {name: f"{{{name}}}" for name in BUILTIN[own.name].fields}
    else:
        fields = {"context": str(own.context) if named_columns(own) else f"{{{own.context}}}"}
    choices = ("{answer}",) if is_written(own) else ("{first choice}", "{second choice}")
    template = GENERIC if config.tuning.examples == "mixture" else config.prompts.template
    return render(own, load_template(template), Example(0, fields, choices, 0)).contexts[0]


def _settings(config: RunConfig, own: BenchmarkConfig, ratio: float) -> dict[str, dict[str, str]]:
    """The settings of one model: its own ratio and benchmark, and no folder's name."""
    data = config.model_dump(mode="json")
    data["benchmarks"], data["pruning"]["ratios"] = [own.model_dump(mode="json")], [ratio]
    settings = settings_of(RunConfig.model_validate(_without_folders(data)))
    del settings["profile"]  # times, not weights
    return settings


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_folders(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return _without_folder(value) if isinstance(value, str) else value


def _without_folder(text: str) -> str:
    """A file or folder by its name alone; any other text as it is."""
    try:
        path = Path(text).expanduser()
        return path.resolve().name if text and (path.is_absolute() or path.exists()) else text
    except (OSError, RuntimeError):  # a text too long to be a path, a ~user there is not
        return text
