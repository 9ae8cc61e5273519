"""What a report says in words: its title, the summary of a run, and what to mind about a benchmark."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tailored_llama.config import RunConfig
from tailored_llama.recovery import MEAN, MODELS, ReportInputs, Row
from tailored_llama.report_parts import number, percent, span


def title(inputs: ReportInputs) -> str:
    """The model and the ratios."""
    asked = [f"{run.ratio:g}" for run in inputs.runs if run.ratio is not None]
    listed = " and ".join(filter(None, [", ".join(asked[:-1]), *asked[-1:]]))
    return f"{inputs.model}, pruned at ratio{'s' if len(asked) > 1 else ''} {listed}" if asked else inputs.model


def plus_minus(row: Row, model: str) -> str:
    """A model's accuracy ± its standard error."""
    value, error = getattr(row, model), getattr(row, f"{model}_stderr")
    return "–" if value is None else f"{number(value)} ± {number(error)}"


def run_name(row: Row) -> str:
    return "pruned" if row.ratio is None else f"ratio {row.ratio:g}"


def summary(inputs: ReportInputs, run: Sequence[Row]) -> str:
    """Two sentences on one run: what pruning did to the model, and what tuning brought back."""
    return " ".join(filter(None, (_size_sentence(run[-1]), _recovery_sentence(inputs, run))))


def _size_sentence(row: Row) -> str:
    parts = []
    if row.dense_parameters and row.pruned_parameters:
        removed = percent(1 - row.pruned_parameters / row.dense_parameters)
        parts.append(
            f"Pruning removed {removed} of all parameters ({row.dense_parameters:,} before, "
            f"{row.pruned_parameters:,} after)"
        )
    if row.dense_perplexity is not None and row.pruned_perplexity is not None:
        before, after = number(row.dense_perplexity, 1), number(row.pruned_perplexity, 1)
        healed = f", and by healing to {number(row.healed_perplexity, 1)}" if row.healed_perplexity else ""
        parts.append(f"{'p' if parts else 'P'}erplexity went from {before} to {after}{healed}")
    if row.prefill_speedup and row.decode_speedup:
        speed = f"{number(row.prefill_speedup, 2)} and {number(row.decode_speedup, 2)} times the dense model's"
        parts.append(f"{'i' if parts else 'I'}t reads and writes at {speed} speed")
    return f"{', and '.join([', '.join(parts[:-1]), *parts[-1:]] if parts[1:] else parts)}." if parts else ""


def _recovery_sentence(inputs: ReportInputs, run: Sequence[Row]) -> str:
    row, benchmarks = run[-1], [row for row in run if row.benchmark != MEAN]
    tuned = row.recovery is not None
    counted = [b for b in benchmarks if b.dense and (b.tailored if tuned else b.pruned) is not None]
    if not counted:
        return ""
    where = f"mean over {len(counted)} benchmarks" if len(counted) > 1 else counted[0].benchmark
    where += f", {sum(b.examples for b in counted):,} examples"
    untuned = [b.pruned / b.dense for b in counted if b.pruned is not None and b.dense]
    without = percent(float(np.mean(untuned))) if len(untuned) == len(counted) else ""
    if not tuned:
        return f"Without tuning, the pruned model reaches {without} of the dense model's accuracy ({where})."
    measured = [where, f"95 % interval {span(row.recovery_low, row.recovery_high)}"]
    measured += [f"{without} when only pruned"] if without else []
    text = f"{_made(inputs.config)} the pruned model reaches {percent(row.recovery)} of the dense model's accuracy "
    text += f"({'; '.join(measured)})"
    if row.chance_corrected is not None:
        which = f"over the {row.cc_benchmarks} of them where that is significant; " if len(counted) > 1 else ""
        text += f", and {percent(row.chance_corrected)} of what the dense model has above its floor "
        text += f"({which}{span(row.cc_low, row.cc_high)})"
    return text + "."


VARIANTS = {"lora": "a LoRA adapter", "rslora": "an rsLoRA adapter", "dora": "a DoRA adapter"}
VARIANTS |= {"prompt": "a tuned soft prompt", "prefix": "a tuned prefix"}


def _made(config: RunConfig | None) -> str:
    """What was done to a pruned model, as the start of a sentence."""
    if config is None:
        return "After tuning,"
    steps = [f"healing on {config.healing.tokens:,} tokens"] if config.healing.tokens else []
    tuning, what = config.tuning, VARIANTS[config.tuning.variant]
    if tuning.examples == "mixture":
        steps.append(f"tuning {what} for all benchmarks on {tuning.shots} examples")
    elif tuning.examples == "benchmark":
        steps.append(f"tuning {what} for each benchmark on {tuning.shots} examples")
    return f"After {' and '.join(steps)}," if steps else "Without tuning,"


def gained_by(config: RunConfig | None) -> str:
    """What lies between the pruned and the tailored model."""
    return "healing and tuning" if config and config.healing.tokens else "tuning"


def benchmark_notes(rows: Sequence[Row]) -> list[str]:
    """What is to be said of single benchmarks: where a recovery says little, and how likely accepted answers are."""
    return floor_notes(rows) + answer_notes(rows)


def answer_notes(rows: Sequence[Row]) -> list[str]:
    """One sentence for each benchmark and run whose answers the model writes."""
    found = []
    for row in rows:
        values = {model: getattr(row, f"{model}_answer_perplexity") for model in MODELS}
        if known := [f"{model} {number(value, 1)}" for model, value in values.items() if value is not None]:
            found.append(f"Perplexity of {row.benchmark}'s accepted answers, {run_name(row)}: {', '.join(known)}.")
    return found


def floor_notes(rows: Sequence[Row]) -> list[str]:
    """One sentence for each benchmark whose recovery says little, as dense itself is at its floor, or close to it."""
    notes: dict[str, str] = {}
    for row in rows:
        if row.dense is None or row.dense_above_floor is not False:
            continue
        if row.dense <= row.floor:
            said, gives = f"Dense itself is at the floor on {row.benchmark}", "nothing"
            against = f"{number(row.dense)} against {number(row.floor)}"
        else:
            said, gives = f"Dense is not significantly above the floor on {row.benchmark}", "little"
            against = f"{plus_minus(row, 'dense')} against {number(row.floor)}"
        notes[row.benchmark] = f"{said} ({against}): its recovery says {gives}."
    return list(notes.values())
