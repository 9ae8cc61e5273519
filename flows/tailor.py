"""The whole pipeline: prune a model at one or several ratios, tailor each to every benchmark, score, report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

from prefect import flow

from flows._command import Command, check_deployed, run_name
from flows._outcome import Attempt, conclude, parts_of, succeeding
from flows._steps import (
    Dense,
    Prompts,
    by_training,
    heal_if_asked,
    measure,
    model_label,
    prepare_dense,
    prune_to,
    render_all,
    text_of,
    tune_adapters,
    tune_dense,
)
from tailored_llama.config import TUNED_DENSE, RunConfig, exported, gguf_types, trims_vocabulary
from tailored_llama.errors import one_line
from tailored_llama.preflight import preflight_tailor
from tailored_llama.reports import recovery_table
from tailored_llama.store import ArtifactRef
from tasks._dispatch import THREADED
from tasks._results import MeasuredModel, QuantisedScore, TailoredRun, TunedDense
from tasks._task import failures, succeeded
from tasks.export import export
from tasks.export_gguf import export_gguf
from tasks.measure_pieces import measure_pieces
from tasks.profile import profile
from tasks.report import report
from tasks.score import score
from tasks.score_quantised import score_quantised


@flow(name="tailor", flow_run_name=run_name, persist_result=False, task_runner=THREADED)
def tailor(config: RunConfig) -> ArtifactRef:
    """Prune, tailor, score and report. Every artifact is found or built; cheap stages and checks come first.

    With `execution.dispatch`, a stage that fails stops only what reads it, and the report is of what there is.

    Raises:
        IncompleteRun: a dispatched stage failed.
    """
    check_deployed(preflight_tailor, config)
    names = [benchmark.name for benchmark in config.benchmarks]
    prompts = render_all(config)
    dense = prepare_dense(config, prompts)
    asked = measure(config, "dense", dense.checkpoint, prompts, names)
    runs = [_tailored(config, dense, ratio, prompts, names) for ratio in config.pruning.ratios]
    tuned, lost = _tuned_dense(config, dense, prompts)

    failed = failures((asked, dense.importance, [replace(run, profile=None) for run in runs], tuned)) | lost
    measured, whole = parts_of(asked), [part for run in runs if (part := _parts(run))]
    if not measured or not (measured.scores or any(run.pruned.scores or run.tailored for run in whole)):
        return conclude(None, failed)
    importance = dense.importance if succeeded(dense.importance) else None
    missing = {name: one_line(error) for name, error in failed.items()}
    quantised = [one for one in _quantised(config, measured, whole, prompts) if succeeded(one)]
    beside = TunedDense(succeeding(tuned.adapters), succeeding(tuned.scores))
    reference = report(config, measured, importance, whole, succeeding(prompts.evaluation), missing, quantised, beside)
    exports = [finished for run in whole for finished in _exported(config, measured, run)]
    return conclude(reference, failed | failures((reference, exports)))


def _tailored(config: RunConfig, dense: Dense, ratio: float, prompts: Prompts, names: list[str]) -> TailoredRun:
    """Prune the model to a ratio and tailor it to every benchmark."""
    label = model_label("tailored", ratio)
    cut = text_of(config, dense.checkpoint)
    pruned = measure(config, model_label("pruned", ratio), prune_to(config, dense, ratio), prompts, names, cut)
    base = heal_if_asked(config, dense, ratio, pruned.checkpoint, prompts)
    adapters = tune_adapters(config, dense, ratio, base, prompts)
    timed = _profile(config, model_label("pruned", ratio), pruned.checkpoint, dense.checkpoint)
    healed = None
    if config.healing.tokens:
        may_finish = names if config.store.export and config.tuning.keep == "better" else []  # without an adapter
        healed = measure(config, model_label("healed", ratio), base, prompts, may_finish, cut)
    pieces = None
    if trims_vocabulary(config):
        pieces = measure_pieces(config, pruned.checkpoint, dense.checkpoint, prompts.evaluation)
    return TailoredRun(
        ratio=ratio,
        pruned=pruned,
        healed=healed,
        adapters=by_training(config, adapters),
        tailored={n: score(config, n, label, base, prompts.evaluation[n], adapters.get(n)) for n in names},
        profile=timed,
        pieces=pieces,
    )


def _tuned_dense(config: RunConfig, dense: Dense, prompts: Prompts) -> tuple[TunedDense, dict[str, Exception]]:
    """Tune the dense model if that is asked; what ends it in this process must not cost the report of the others."""
    if not config.tuning.dense:
        return TunedDense(), {}
    attempt = Attempt(TUNED_DENSE, partial(tune_dense, config, dense.checkpoint, prompts))
    return (TunedDense(), {attempt.name: attempt.error}) if attempt.error else (attempt.value, {})


def _profile(config: RunConfig, label: str, pruned: ArtifactRef, dense: ArtifactRef) -> ArtifactRef | None:
    """Profile a model; None if that fails: two models may not fit where one does, which must not cost the scores."""
    if not config.profile.batches:
        return None
    attempt = Attempt(f"profile {label}", partial(profile, config, label, pruned, dense))
    return None if attempt.error else attempt.value


def _parts(run: TailoredRun) -> TailoredRun | None:
    """What there is of a run, or None without a pruned model; waits for its stages."""
    if not (pruned := parts_of(run.pruned)):
        return None
    return replace(
        run,
        pruned=pruned,
        healed=parts_of(run.healed) if run.healed else None,
        adapters=succeeding(run.adapters),
        tailored=succeeding(run.tailored),
        profile=run.profile if succeeded(run.profile) else None,
        pieces=run.pieces if succeeded(run.pieces) else None,
    )


def _quantised(
    config: RunConfig, dense: MeasuredModel, runs: list[TailoredRun], prompts: Prompts
) -> list[QuantisedScore]:
    """Score the dense and the tailored models in the GGUF types of the export; what fails must not cost the report."""
    scores = []
    for kind, name in product(gguf_types(config), dense.scores):
        score_in = partial(score_quantised, config, name, gguf_type=kind, prompts=prompts.evaluation[name])
        models = {None: partial(score_in, label="dense", checkpoint=dense.checkpoint)} | {
            run.ratio: partial(
                score_in, label=model_label("tailored", run.ratio), checkpoint=run.base, adapter=run.adapter(name)
            )
            for run in runs
            if name in run.tailored
        }
        for ratio, build in models.items():
            attempt = Attempt(f"score {name} in {kind}", build)
            if not attempt.error:
                scores.append(QuantisedScore(ratio, kind, name, attempt.value))
    return scores


def _exported(config: RunConfig, dense: MeasuredModel, run: TailoredRun) -> Iterator[ArtifactRef]:
    """Export the models of a run that have all their scores. This comes last: a full disk must not cost the report."""
    if not config.store.export:
        return
    scored = [run.pruned.scores, run.tailored]
    if run.healed and config.tuning.keep == "better":
        scored.append(run.healed.scores)
    for name in [own for own in dense.scores if all(own in scores for scores in scored)]:
        finished = export(config, name, dense, run)
        yield finished
        for gguf_type in gguf_types(config):
            yield export_gguf(config, name, run.ratio, gguf_type, finished)


COMMAND = Command(tailor, preflight_tailor, recovery_table, "report.html", exported)

if __name__ == "__main__":
    raise SystemExit("error: got python -m flows.tailor; allowed: python -m flows tailor CONFIG.toml")
