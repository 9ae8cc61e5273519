"""The sentences of a report: its title, the summary of a run, and notes on single benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tailored_llama.config import DENSE, RunConfig
from tailored_llama.evaluation import HEALED, PRUNED, TAILORED, ModelRow, RecoveryTable
from tailored_llama.reports.inputs import ReportInputs
from tailored_llama.reports.parts import NO_DIFFERENCE, accuracy_of, number, percent, points, span, speedup
from tailored_llama.training import Comparison, is_better

NOTHING = "Tuning brought nothing here"

VARIANTS = {"lora": "a LoRA adapter", "rslora": "an rsLoRA adapter", "dora": "a DoRA adapter"}
VARIANTS |= {"prompt": "a tuned soft prompt"}


def title(inputs: ReportInputs) -> str:
    """The title: the model and the ratios, and whether stages are missing."""
    asked = [f"{run.table.ratio:g}" for run in inputs.runs if run.table.ratio is not None]
    listed = " and ".join(filter(None, [", ".join(asked[:-1]), *asked[-1:]]))
    text = f"{inputs.model}, pruned at ratio{'s' if len(asked) > 1 else ''} {listed}" if asked else inputs.model
    return f"{text} (incomplete)" if inputs.failed else text


def run_name(ratio: float | None) -> str:
    """The name of a run in a report of several."""
    return "pruned" if ratio is None else f"ratio {ratio:g}"


def summary(table: RecoveryTable, config: RunConfig | None) -> str:
    """Two sentences on one run: what pruning did to the model, and what tuning brought back."""
    return " ".join(filter(None, (size_sentence(table), _recovery_sentence(table, config))))


def size_sentence(table: RecoveryTable) -> str:
    """What pruning removed, and what became of perplexity and speed; empty if nothing of it is known."""
    dense, pruned = (table.size(model) for model in (DENSE, PRUNED))
    parts = []
    if dense.parameters and pruned.parameters:
        removed = f"{percent(1 - pruned.parameters / dense.parameters)} of all parameters"
        if dense.body and pruned.body:
            removed += f" and {percent(1 - pruned.body / dense.body)} of those outside the embeddings"
        parts.append(f"Pruning removed {removed} ({dense.parameters:,} before, {pruned.parameters:,} after)")
    if tokens := kept_tokens(table):
        parts.append(tokens)
    measure, (before, after, mended) = perplexities(table)
    if before and after:
        mended = f", and by healing to {mended}" if mended else ""
        parts.append(f"{measure if parts else measure.capitalize()} went from {before} to {after}{mended}")
    if speed := _speed(pruned):
        parts.append(speed if parts else speed.capitalize())
    return f"{', and '.join([', '.join(parts[:-1]), *parts[-1:]] if parts[1:] else parts)}." if parts else ""


def _speed(pruned: ModelRow) -> str:
    """How fast the pruned model reads and writes, as a clause; empty if it was not timed."""
    speeds = {"reading": speedup(pruned, "prefill"), "writing": speedup(pruned, "decode")}
    if not all(speeds.values()):
        return ""
    alike = [phase for phase, speed in speeds.items() if speed == NO_DIFFERENCE]
    if len(alike) == 2:
        return "no difference in speed was measured"
    differing = " and ".join(f"{speed} {phase}" for phase, speed in speeds.items() if phase not in alike)
    unclear = f", while no difference was measured for {alike[0]}" if alike else ""
    return f"its speed ÷ the dense model's is {differing}{unclear}"


def kept_tokens(table: RecoveryTable) -> str:
    """How many tokens are left; empty if none was removed."""
    dense, pruned = table.size(DENSE), table.size(PRUNED)
    if not dense.vocab_size or not pruned.vocab_size or dense.vocab_size == pruned.vocab_size:
        return ""
    return f"{pruned.vocab_size:,} of {dense.vocab_size:,} tokens are left"


def perplexities(table: RecoveryTable) -> tuple[str, tuple[str, str, str]]:
    """Perplexity of the dense, the pruned and the healed model, and what it is per; empty if not measured.

    Per token where the vocabularies are alike, else per byte, as only that compares.
    """
    per_byte, rows = bool(kept_tokens(table)), [table.size(model) for model in (DENSE, PRUNED, HEALED)]
    values = [row.byte_perplexity if per_byte else row.perplexity for row in rows]
    dense, pruned, healed = ("" if value is None else number(value, 3 if per_byte else 1) for value in values)
    return "perplexity per byte" if per_byte else "perplexity", (dense, pruned, healed)


def _recovery_sentence(table: RecoveryTable, config: RunConfig | None) -> str:
    tailored = table.overall(TAILORED)
    tuned = tailored is not None and tailored.recovery is not None
    rows = [table.row(TAILORED if tuned else PRUNED, name) for name in table.benchmarks]
    counted = [row for row in rows if row is not None and row.recovery is not None]
    if not counted:
        return ""
    where = f"mean over {len(counted)} benchmarks" if len(counted) > 1 else counted[0].benchmark
    where += f", {sum(row.examples for row in counted):,} examples"
    pruned = [table.row(PRUNED, row.benchmark) for row in counted]
    untuned = [row.recovery for row in pruned if row is not None and row.recovery is not None]
    without = percent(float(np.mean(untuned))) if len(untuned) == len(counted) else ""
    if not tuned or tailored is None:
        return f"Without tuning, the pruned model reaches {without} of the dense model's accuracy ({where})."
    measured = [where, f"95 % interval {span(tailored.recovery_low, tailored.recovery_high)}"]
    measured += [f"{without} when only pruned"] if without else []
    text = f"{_after(config)} the pruned model reaches {percent(tailored.recovery)} of the dense model's accuracy "
    text += f"({'; '.join(measured)})"
    if tailored.chance_corrected is not None:
        which = f"over the {tailored.cc_benchmarks} of them where that is significant; " if len(counted) > 1 else ""
        text += f", and {percent(tailored.chance_corrected)} of what the dense model has above its floor "
        text += f"({which}{span(tailored.cc_low, tailored.cc_high)})"
    return text + "."


def _after(config: RunConfig | None) -> str:
    """The steps after pruning, as the start of a sentence."""
    if config is None:
        return "After tuning,"
    steps = [f"healing on {config.healing.tokens:,} tokens"] if config.healing.tokens else []
    tuning, adapter = config.tuning, VARIANTS[config.tuning.variant]
    if tuning.examples == "mixture":
        steps.append(f"tuning {adapter} for all benchmarks on {tuning.shots} examples")
    elif tuning.examples == "benchmark":
        steps.append(f"tuning {adapter} for each benchmark on {tuning.shots} examples")
    return f"After {' and '.join(steps)}," if steps else "Without tuning,"


def gained_by(config: RunConfig | None) -> str:
    """The steps from the pruned to the tailored model."""
    return "healing and tuning" if config and config.healing.tokens else "tuning"


def held_out_evidence(compared: Comparison) -> str:
    """What an adapter did on held-out examples, as part of a sentence; differences ± their paired standard error."""
    parts = []
    gain, error = compared.accuracy_gain, compared.accuracy_error
    if gain is not None:
        went = f"accuracy went from {number(compared.untuned_accuracy)} to {number(compared.tuned_accuracy)}"
        parts.append(f"{went} ({points(gain)}{_error(error, 100, 1)} points)")
    loss = "the loss over the choices" if gain is not None else "the loss of the answer"
    went = f"{loss} from {number(compared.untuned_loss)} to {number(compared.tuned_loss)}"
    change = f"{-compared.loss_gain + 0.0:+.3f}".replace("-", "−")
    parts.append(f"{went} ({change}{_error(compared.loss_error, 1, 3)})")
    return f"on {compared.examples:,} held-out train examples {' and '.join(parts)}"


def verdict_line(compared: Comparison) -> str:
    """Whether an adapter is better than none on held-out examples, with the evidence."""
    verdicts = {True: "Better than no adapter", False: NOTHING, None: "No verdict from a single example"}
    return f"{verdicts[is_better(compared)]}: {held_out_evidence(compared)} (differences ± paired standard error)."


def _error(error: float | None, scale: int, digits: int) -> str:
    return "" if error is None else f" ± {number(scale * error, digits)}"


def floor_notes(tables: Sequence[RecoveryTable]) -> list[str]:
    """One sentence for each benchmark on which the dense model is not significantly above its floor."""
    notes: dict[str, str] = {}
    for table in tables:
        for name in table.benchmarks:
            row = table.row(DENSE, name)
            if row is None or row.accuracy is None or row.above_floor is not False:
                continue
            finding, shown, value = "is not significantly above", accuracy_of(row).text, "little"
            if row.accuracy <= row.floor:
                finding, shown, value = "itself is at", number(row.accuracy), "nothing"
            figures = f"{shown} against {number(row.floor)}"
            notes[name] = f"Dense {finding} the floor on {name} ({figures}): its recovery says {value}."
    return list(notes.values())
