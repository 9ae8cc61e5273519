"""The sentences of a run's report: its title, the summary, and notes on single benchmarks."""

from collections.abc import Sequence
from statistics import fmean

from tailored_llama.config import DENSE, RunConfig
from tailored_llama.evaluation import PRUNED, TAILORED, RecoveryRow
from tailored_llama.reports.inputs import ReportInputs, RunResults
from tailored_llama.reports.parts import accuracy_of, listed, number, percent, points, span
from tailored_llama.training import Comparison, is_better

NOTHING = "Tuning brought nothing here"


def title(inputs: ReportInputs) -> str:
    """The title: the model and the ratios, and whether stages are missing."""
    ratios = [f"{run.ratio:g}" for run in inputs.runs if run.ratio is not None]
    pruned = f", pruned at ratio{'s' if len(ratios) > 1 else ''} {listed(ratios)}" if ratios else ""
    return f"{inputs.config.model.source}{pruned}{' (incomplete)' if inputs.failed else ''}"


def summary(run: RunResults, config: RunConfig, model: str = TAILORED) -> str:
    """Two sentences on one run: what pruning did to the model, and what `model` reaches."""
    return f"{_size_sentence(run)} {_recovery_sentence(run, config, model)}".strip()


def _size_sentence(run: RunResults) -> str:
    """Say what pruning removed, and what became of perplexity; empty if nothing of it is known."""
    dense, pruned = run.size(DENSE), run.size(PRUNED)
    parts = []
    if dense.parameters and pruned.parameters:
        removed = f"{percent(1 - pruned.parameters / dense.parameters)} of all parameters"
        if dense.body and pruned.body:
            removed += f" and {percent(1 - pruned.body / dense.body)} of those outside the embeddings"
        parts.append(f"pruning removed {removed} ({dense.parameters:,} before, {pruned.parameters:,} after)")
    if _has_fewer_tokens(run):
        parts.append(f"{pruned.vocab_size:,} of {dense.vocab_size:,} tokens are left")
    measure, (before, after) = perplexities(run)
    if before and after:
        parts.append(f"{measure} went from {before} to {after}")
    text = listed(parts, ", and ")
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _has_fewer_tokens(run: RunResults) -> bool:
    dense, pruned = run.size(DENSE).vocab_size, run.size(PRUNED).vocab_size
    return bool(dense and pruned and dense != pruned)


def perplexities(run: RunResults) -> tuple[str, tuple[str, str]]:
    """Perplexity of the dense and the pruned model, and what it is per; empty if not measured.

    Per token where the vocabularies are alike, else per byte, as only that compares.
    """
    per_byte, rows = _has_fewer_tokens(run), [run.size(model) for model in (DENSE, PRUNED)]
    values = [row.byte_perplexity if per_byte else row.perplexity for row in rows]
    dense, pruned = ("" if value is None else number(value, 3 if per_byte else 1) for value in values)
    return "perplexity per byte" if per_byte else "perplexity", (dense, pruned)


def _recovery_sentence(run: RunResults, config: RunConfig, model: str) -> str:
    """Say what a model reaches, or else the pruned one, of the dense model's accuracy; empty if neither was scored."""
    row, compared, pruned = run.overall(model), _compared(run, model), _compared(run, PRUNED)
    if row is None or row.recovery is None:
        return "" if model == PRUNED else _recovery_sentence(run, config, PRUNED)
    where = next(iter(compared)) if len(compared) == 1 else f"mean over {len(compared)} benchmarks"
    measured = [f"{where}, {sum(compared_row.examples for compared_row in compared.values()):,} examples"]
    measured.append(f"95 % interval {span(row.recovery_low, row.recovery_high)}")
    tuned = model == TAILORED
    if tuned and compared.keys() <= pruned.keys():
        measured.append(f"{percent(fmean(pruned[name].recovery or 0.0 for name in compared))} when only pruned")
    text = f"{_after(config) if tuned else 'Without tuning,'} the pruned model reaches "
    text += f"{percent(row.recovery)} of the dense model's accuracy ({'; '.join(measured)})"
    if tuned and row.chance_corrected is not None:
        which = f"over the {row.cc_benchmarks} of them where that is significant; " if len(compared) > 1 else ""
        text += f", and {percent(row.chance_corrected)} of what the dense model has above its floor "
        text += f"({which}{span(row.cc_low, row.cc_high)})"
    return f"{text}."


def _compared(run: RunResults, model: str) -> dict[str, RecoveryRow]:
    """A model's rows by benchmark, where it has a recovery."""
    rows = [row for name in run.benchmarks if (row := run.row(model, name)) and row.recovery is not None]
    return {row.benchmark: row for row in rows}


def _after(config: RunConfig) -> str:
    if config.tuning.examples == "none":
        return "Without tuning,"
    whose = "all benchmarks" if config.tuning.examples == "mixture" else "each benchmark"
    return f"After tuning a LoRA adapter for {whose} on {config.tuned_on},"


def held_out_evidence(compared: Comparison) -> str:
    """Say in part of a sentence what an adapter did on held-out examples; differences ± paired standard error."""
    gain, loss, parts = compared.accuracy_gain, "the loss of the answer", []
    if gain is not None:
        went = f"accuracy went from {number(compared.untuned_accuracy)} to {number(compared.tuned_accuracy)}"
        parts.append(f"{went} ({points(gain)}{plus_minus(compared.accuracy_error, 100, 1)} points)")
        loss = "the loss over the choices"
    went = f"{loss} from {number(compared.untuned_loss)} to {number(compared.tuned_loss)}"
    change = f"{-compared.loss_gain + 0.0:+.3f}".replace("-", "−")
    parts.append(f"{went} ({change}{plus_minus(compared.loss_error, 1, 3)})")
    return f"on {compared.examples:,} held-out train examples {' and '.join(parts)}"


def plus_minus(error: float | None, scale: int, digits: int) -> str:
    """The standard error behind a figure; empty for None."""
    return "" if error is None else f" ± {number(scale * error, digits)}"


def verdict_line(compared: Comparison) -> str:
    """Say whether an adapter is better than none on held-out examples, with the evidence."""
    verdicts = {True: "Better than no adapter", False: NOTHING, None: "Too few held-out examples for a verdict"}
    return f"{verdicts[is_better(compared)]}: {held_out_evidence(compared)} (differences ± paired standard error)."


def floor_notes(runs: Sequence[RunResults]) -> list[str]:
    """One sentence for each benchmark on which the dense model is not significantly above its floor."""
    notes: dict[str, str] = {}
    for run in runs:
        for name in run.benchmarks:
            row = run.row(DENSE, name)
            if row is None or row.accuracy is None or row.above_floor is not False:
                continue
            finding, shown, value = "is not significantly above", accuracy_of(row).text, "little"
            if row.accuracy <= row.floor:
                finding, shown, value = "itself is at", number(row.accuracy), "nothing"
            figures = f"{shown} against {number(row.floor)}"
            notes[name] = f"Dense {finding} the floor on {name} ({figures}): its recovery says {value}."
    return list(notes.values())
