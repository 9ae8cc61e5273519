"""Diagnosis: the failures that the method names, each with its evidence and the lever to try (arXiv 2410.19185).

Three signatures: accuracy far below the baseline, no gain after LoRA, unstable training. The method gives the threshold
of the first; those of the third are ours.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from tailored_llama.config import RunConfig
from tailored_llama.evaluation import TAILORED, RecoveryRow
from tailored_llama.reports.inputs import RunResults
from tailored_llama.reports.parts import accuracy_of, number, percent, points, span
from tailored_llama.reports.text import NOTHING, held_out_evidence
from tailored_llama.store import read_table
from tailored_llama.training import LOG_SCHEMA, Comparison, is_better, ships_adapter

LOW = 0.65  # tailored ÷ dense accuracy below this: too much removed
SPIKE = 2.0  # a step's loss above this many times the median of the steps before it is a spike
STEPS = 3  # steps before one may be called a spike
RISE = 1.1  # a held-out loss above this many times the one before tuning


Finding = tuple[str, str, str]  # signature, evidence, lever


def too_much_removed(tailored: RecoveryRow) -> Finding | None:
    """Tailored accuracy below 65 % of the dense model's: too much was removed, or the wrong kind of group."""
    if tailored.recovery is None or tailored.recovery >= LOW:
        return None
    between = span(tailored.recovery_low, tailored.recovery_high)
    evidence = f"accuracy is {accuracy_of(tailored).text}, {percent(tailored.recovery)} of the dense model's"
    evidence += f" (95 % interval {between})" if between else ""
    lever = "remove less (pruning.ratios), or another kind of group (pruning.kinds: tokens leave before heads do)"
    return f"Below {percent(LOW, 0)} of the dense model: too much removed, or the wrong kind", evidence, lever


def no_gain(tailored: RecoveryRow, comparison: Comparison | None, config: RunConfig) -> Finding | None:
    """No gain after tuning: by the held-out verdict, or else because tailored scores no more than pruned."""
    nothing = is_better(comparison) is False
    if not nothing and (tailored.gain is None or tailored.gain > 0):
        return None
    evidence = [held_out_evidence(comparison)] if comparison else []
    if tailored.gain is not None:
        scored = f"on the {tailored.examples:,} scored examples {points(tailored.gain)} points over the pruned model"
        low, high = points(tailored.gain_low), points(tailored.gain_high)
        evidence.append(scored + (f" (95 % interval {low} to {high})" if tailored.gain_low is not None else ""))
    levers = ["a prompt that fits the task (prompts.template; a sweep compares several)"]
    levers += ["more examples or epochs (tuning.shots, tuning.epochs)", "a lower ratio, if the capacity is gone"]
    signature = NOTHING if nothing else "No gain from tuning where it is scored"
    if nothing:
        merged = " (an exported model has the adapter all the same, as tuning.keep says)"
        signature += merged if ships_adapter(config.tuning, comparison) else ": an exported model is the untuned one"
    return signature, ", and ".join(evidence), "; ".join(levers)


def unstable(log: Mapping[str, Sequence[Any]]) -> Finding | None:
    """Unstable training: a spike of the loss, or a held-out loss that rose; `log` are the columns of `log.parquet`."""
    evidence = []
    known = [(step, loss) for step, loss in zip(log["step"], log["loss"], strict=True) if loss is not None]
    spikes = []
    for i, (step, loss) in enumerate(known[STEPS:], STEPS):
        before = median(earlier for _, earlier in known[:i])
        if before > 0 and loss / before > SPIKE:
            spikes.append((loss / before, step, loss))
    if spikes:
        factor, step, loss = max(spikes)
        times = f"{number(factor, 1)} times the median of the steps before"
        steps = f" ({len(spikes)} such steps)" if len(spikes) > 1 else ""
        evidence.append(f"at step {step} the loss was {number(loss, 2)}, {times}{steps}")
    held = [(loss, epoch) for epoch, loss in zip(log["epoch"], log["held_out_loss"], strict=True) if loss is not None]
    if len(held) > 1:
        (before, _), (worst, epoch) = held[0], max(held[1:])
        if worst > RISE * before:
            lost = f"the held-out loss was {number(worst, 2)}, before tuning {number(before, 2)}"
            evidence.append(f"after epoch {epoch} {lost}")
    if not evidence:
        return None
    lever = "a lower tuning.learning_rate or tuning.rank, or a longer tuning.warmup"
    return "Unstable training: rank or learning rate too high", ", and ".join(evidence), lever


def diagnose(runs: Sequence[RunResults], config: RunConfig) -> list[str]:
    """One paragraph for each signature and lever, with every case; ratios are named if there are several.

    Raises:
        InputError: the log or the comparison of an adapter is broken.
    """
    cases: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        of = f" ({run.name})" if len(runs) > 1 else ""
        tailored = [row for name in run.benchmarks if (row := run.row(TAILORED, name))]
        found = [(row.benchmark, too_much_removed(row)) for row in tailored]
        if run.adapters:
            found += [(row.benchmark, no_gain(row, run.comparison(row.benchmark), config)) for row in tailored]
        for name, adapter in run.adapters.items():
            found.append((name, unstable(read_table(adapter / "log.parquet", LOG_SCHEMA).to_pydict())))
        for name, finding in found:
            if finding:
                signature, evidence, lever = finding
                cases.setdefault((signature, lever), []).append(f"{name}{of}: {evidence}")
    return [f"{signature}. {'; '.join(evidences)}. Try: {lever}." for (signature, lever), evidences in cases.items()]
