"""The whole pipeline: prune a model at one or several ratios, tailor each to every benchmark, score, report."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product

from tailored_llama.config import TUNED_DENSE, GgufType, RunConfig, as_shown, exports, named_benchmark
from tailored_llama.errors import one_line
from tailored_llama.evaluation import ByType, MeasuredModel, ProfileSettings, TailoredRun, TunedDense
from tailored_llama.pipeline import stages, steps
from tailored_llama.pipeline.futures import Artifact, Failed, attempt, failures, report_or_raise, without_failures
from tailored_llama.pipeline.reporting import ExportSettings, ReportSettings
from tailored_llama.pipeline.runner import Runner
from tailored_llama.pipeline.steps import Dense, Prompts
from tailored_llama.serving import GgufSettings, QuantisedSettings
from tailored_llama.store import FINISHED, GGUF, ArtifactRef, place

log = logging.getLogger(__name__)

Model = tuple[Artifact, Artifact | None]  # a checkpoint, and its adapter


def tailor(run: Runner, config: RunConfig) -> ArtifactRef:
    """Prune, tailor, score and report. Every artifact is found or built; cheap stages and checks come first.

    Where stages run side by side, one that fails stops only what reads it; the report is of what there is, and the
    failure is raised at the end, as IncompleteRun.
    """
    prompts = steps.render_all(run, config)
    dense = steps.prepare_dense(run, config, prompts)
    asked = steps.measure(run, config, "dense", dense.checkpoint, prompts)
    tailored = [_tailored(run, config, dense, ratio, prompts) for ratio in config.pruning.ratios]
    tuned: TunedDense[Artifact] | Failed = TunedDense()
    if config.tuning.dense and config.tuning.examples != "none":
        tuned = attempt(TUNED_DENSE, partial(steps.tune_dense, run, config, dense.checkpoint, prompts))

    failed = failures((asked, dense.importance, [replace(result, profile=None) for result in tailored], tuned))
    measured, whole = without_failures(asked), without_failures(tailored)
    if not measured or not (measured.scores or any(result.pruned.scores or result.tailored for result in whole)):
        return report_or_raise(None, failed)
    scored = [_quantised(run, config, prompts, "dense", dict.fromkeys(measured.scores, (measured.checkpoint, None)))]
    for result in whole:
        tuned_on = {name: (result.base, result.adapter(name)) for name in result.tailored if result.adapters}
        scored.append(_quantised(run, config, prompts, _label("tailored", result.ratio), tuned_on))
    failed |= failures(scored)
    of_dense, *of_runs = without_failures(scored)
    shown = {
        "dense": replace(measured, quantised=of_dense),
        "runs": [replace(result, quantised=quantised) for result, quantised in zip(whole, of_runs, strict=True)],
        "prompts": without_failures(prompts.evaluation),
        "tuned_dense": without_failures(tuned) or TunedDense(),
    }
    settings = ReportSettings(as_shown(config), {name: one_line(error) for name, error in failed.items()})
    report = run(stages.REPORT, settings, "report", **shown)
    finished = [model for result in whole for model in _exported(run, config, measured, result, prompts)]
    return report_or_raise(report, failed | failures((report, finished)))


def _label(model: str, ratio: float) -> str:
    """The label of a run's model, such as pruned @ 0.20."""
    return f"{model} @ {ratio:.2f}" if round(ratio, 2) == ratio else f"{model} @ {ratio}"


def _tailored(run: Runner, config: RunConfig, dense: Dense, ratio: float, prompts: Prompts) -> TailoredRun[Artifact]:
    """Prune the model to a ratio and tailor it to every benchmark."""
    name = _label("pruned", ratio)
    checkpoint = steps.prune_to(run, config, dense, ratio, prompts)
    pruned = steps.measure(run, config, name, checkpoint, prompts, dense.checkpoint)
    base = steps.heal_if_asked(run, config, dense.checkpoint, ratio, checkpoint, prompts)
    adapters = steps.tune_adapters(run, config, ratio, base, prompts)
    profile = healed = None
    if config.profile.batches:  # timing holds two models in memory; if they do not fit, the scores must still come
        settings, title = ProfileSettings.of(config.profile, config.execution.device), f"profile {name}"
        compared = {"checkpoint": checkpoint, "against": dense.checkpoint}
        profile = attempt(title, partial(run, stages.PROFILE, settings, title, **compared))
    if config.healing.tokens:
        may_finish = config.store.export and config.tuning.keep == "better"  # without an adapter
        asked = prompts if may_finish else replace(prompts, evaluation={})
        healed = steps.measure(run, config, _label("healed", ratio), base, asked, dense.checkpoint)
    tailored = steps.score_all(run, config, _label("tailored", ratio), base, prompts, adapters)
    return TailoredRun(ratio, pruned, healed, steps.by_training(config, adapters), tailored, profile)


def _quantised(
    run: Runner, config: RunConfig, prompts: Prompts, label: str, models: Mapping[str, Model]
) -> ByType[Artifact]:
    """Score a benchmark's model in the GGUF types of the export; what fails here must not cost the report."""

    def score(kind: GgufType, name: str, title: str) -> Artifact:
        (checkpoint, adapter), asked = models[name], prompts.evaluation[name]
        written_as = GgufSettings(kind, config.model.short_name)
        # It is scored and not served, so that no chat has to ask it anything.
        file = run(stages.GGUF_FILE, written_as, f"write {title}", checkpoint=checkpoint, adapter=adapter, prompts={})
        settings = QuantisedSettings.of(named_benchmark(config, name), kind)
        return run(stages.QUANTISED, settings, title, checkpoint=checkpoint, gguf=file, prompts=asked)

    scores: dict[str, dict[str, Artifact]] = {}
    for kind, name in product(dict.fromkeys(export.type for export in exports(config) if export.type), models):
        title = f"score {name} {label}, {kind}"
        scores.setdefault(kind, {})[name] = attempt(title, partial(score, kind, name, title))
    return scores


def _exported(
    run: Runner, config: RunConfig, dense: MeasuredModel[Artifact], result: TailoredRun[Artifact], prompts: Prompts
) -> Iterator[Artifact]:
    """Export the models of a run that have all their scores. This comes last: a full disk must not cost the report."""
    scored = [result.pruned.scores, result.tailored]
    if result.healed and config.tuning.keep == "better":
        scored.append(result.healed.scores)
    for name in [benchmark for benchmark in dense.scores if all(benchmark in scores for scores in scored)]:
        wanted = [export for export in exports(config) if (export.ratio, export.benchmark) == (result.ratio, name)]
        if not wanted:
            return
        title = f"export {name} @ {result.ratio:.2f}"
        of_benchmark = replace(
            result,
            pruned=_on(result.pruned, name),
            healed=_on(result.healed, name) if result.healed else None,
            tailored={name: result.tailored[name]},
            adapters={name: result.adapter(name)},
            profile=None,
        )
        settings = ExportSettings(as_shown(config, ("profile",)), name)
        made_of, asked = {"dense": _on(dense, name), "run": of_benchmark}, prompts.of_chat(name)
        finished = run(stages.FINISHED_MODEL, settings, title, **made_of, prompts=asked)
        yield finished
        for export in wanted:
            written, mark = finished, FINISHED
            if export.type:
                gguf, about = GgufSettings(export.type, export.name), f"{title}, gguf {export.type}"
                inputs = {"checkpoint": finished, "adapter": None, "prompts": asked}
                written, mark = run(stages.GGUF_FILE, gguf, about, **inputs), GGUF
                yield written
            place(run.open(written), export.folder, "store.export", "an exported model", [mark])
            log.info("finished model: %s", export.folder)


def _on(model: MeasuredModel[Artifact], benchmark: str) -> MeasuredModel[Artifact]:
    """A model with its scores on one benchmark alone."""
    return replace(model, scores={name: scores for name, scores in model.scores.items() if name == benchmark})
