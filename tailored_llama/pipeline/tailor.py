"""The whole pipeline: prune a model at one or several ratios, tailor each to every benchmark, score, report."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

from tailored_llama.config import RunConfig, as_shown, exports, named_benchmark
from tailored_llama.evaluation import ByType, MeasuredModel, TailoredRun, TunedDense
from tailored_llama.pipeline import stages, steps
from tailored_llama.pipeline.executor import Executor
from tailored_llama.pipeline.graph import Artifact, Graph, Node
from tailored_llama.pipeline.reporting import ExportSettings, ReportSettings
from tailored_llama.pipeline.steps import Dense, Prompts
from tailored_llama.serving import GgufSettings, QuantisedSettings

Model = tuple[Artifact, Artifact | None]  # a checkpoint, and its adapter


def tailor(run: Executor, config: RunConfig) -> Graph:
    """Prune, tailor, score and report; cheap stages and checks come first, and finished models last."""
    prompts = steps.render_all(config)
    dense = steps.prepare_dense(config, prompts)
    measured = steps.measure(config, "dense", dense.checkpoint, prompts)
    made = [_tailored(config, dense, ratio, prompts) for ratio in config.pruning.ratios]
    tuned: TunedDense[Artifact] = TunedDense()
    if config.tuning.dense and config.tuning.examples != "none":
        tuned = steps.tune_dense(config, dense.checkpoint, prompts)
    as_it_is = dict.fromkeys(measured.scores, (measured.checkpoint, None))
    report = stages.report(
        "report",
        settings=ReportSettings(as_shown(config)),
        dense=replace(measured, quantised=_quantised(config, prompts, "dense", as_it_is)),
        runs=[replace(result, quantised=_quantised_run(config, prompts, result)) for result in made],
        prompts=prompts.evaluation,
        tuned_dense=tuned,
    )
    exported = [export for result in made for export in _exported(config, measured, result, prompts)]
    return Graph(report, steps.checks(config, dense, prompts), dict(exported))


def _tailored(config: RunConfig, dense: Dense, ratio: float, prompts: Prompts) -> TailoredRun[Artifact]:
    """Prune the model to a ratio and tailor it to every benchmark."""
    checkpoint = steps.prune_to(config, dense, ratio, prompts)
    pruned = steps.measure(config, f"pruned {steps.at(ratio)}", checkpoint, prompts, dense.checkpoint)
    adapters = steps.tune_adapters(config, ratio, checkpoint, prompts)
    tailored = steps.score_all(config, f"tailored {steps.at(ratio)}", checkpoint, prompts, adapters)
    return TailoredRun(ratio, pruned, steps.by_training(config, adapters), tailored)


def _quantised_run(config: RunConfig, prompts: Prompts, run: TailoredRun[Artifact]) -> ByType[Artifact]:
    tuned = {name: (run.pruned.checkpoint, run.adapter(name)) for name in run.tailored if run.adapters}
    return _quantised(config, prompts, f"tailored {steps.at(run.ratio)}", tuned)


def _quantised(config: RunConfig, prompts: Prompts, label: str, models: Mapping[str, Model]) -> ByType[Artifact]:
    """Score a benchmark's model in the GGUF types of the export."""
    scores: dict[str, dict[str, Artifact]] = {}
    for kind, name in product(dict.fromkeys(export.type for export in exports(config) if export.type), models):
        checkpoint, adapter = models[name]
        title, written_as = f"score {name} {label}, {kind}", GgufSettings(kind, config.model.short_name)
        asked = prompts.of_chat(name)
        file = stages.gguf(f"write {title}", settings=written_as, checkpoint=checkpoint, adapter=adapter, prompts=asked)
        scores.setdefault(kind, {})[name] = stages.quantised(
            title,
            settings=QuantisedSettings.of(named_benchmark(config, name), kind),
            checkpoint=checkpoint,
            gguf=file,
            prompts=prompts.evaluation[name],
        )
    return scores


def _exported(
    config: RunConfig, dense: MeasuredModel[Artifact], result: TailoredRun[Artifact], prompts: Prompts
) -> Iterator[tuple[Path, Node]]:
    """The finished models of a run that have all their scores, by the folders that get them."""
    for export in exports(config):
        name = export.benchmark
        if export.ratio != result.ratio or name not in result.tailored or not result.adapters:
            continue
        title = f"export {name} {steps.at(result.ratio)}"
        of_benchmark = replace(
            result,
            pruned=_on(result.pruned, name),
            tailored={name: result.tailored[name]},
            adapters={name: result.adapter(name)},
        )
        asked = prompts.of_chat(name)
        finished = stages.finished(
            title,
            settings=ExportSettings(as_shown(config), name),
            dense=_on(dense, name),
            run=of_benchmark,
            prompts=asked,
        )
        if export.type:
            written = GgufSettings(export.type, export.name)
            yield (
                export.folder,
                stages.gguf(
                    f"{title}, gguf {export.type}", settings=written, checkpoint=finished, adapter=None, prompts=asked
                ),
            )
        else:
            yield export.folder, finished


def _on(model: MeasuredModel[Artifact], benchmark: str) -> MeasuredModel[Artifact]:
    """A model with its scores on one benchmark alone."""
    return replace(model, scores={name: scores for name, scores in model.scores.items() if name == benchmark})
