"""A sweep over a grid of settings."""

from dataclasses import replace

from tailored_llama.config import RunConfig, SweepConfig, as_shown, dense_runs, sweep_cells, tuned_dense_cells
from tailored_llama.evaluation import MeasuredModel, SweptCell
from tailored_llama.pipeline import stages, steps
from tailored_llama.pipeline.executor import Executor
from tailored_llama.pipeline.graph import Artifact, Graph, nodes_in
from tailored_llama.pipeline.reporting import SweepSettings
from tailored_llama.pipeline.steps import Prompts

Row = SweptCell[Artifact]


def sweep(run: Executor, config: SweepConfig) -> Graph:
    """Prune a model by every combination of a grid of settings, and measure each, and every dense model.

    A failure appears in the table, and stops no other cell. With `tuning.dense`, dense models are also tuned on the
    shots of the cells.
    """
    swept = sweep_cells(config)
    models, tuned = dense_runs(config, swept), tuned_dense_cells(config, swept)
    dense = [_dense_row(config, label, own) for label, own in models.items()]
    cells = dense + [_dense_row(config, cell.label, cell.run, tuned=True) for cell in tuned]
    cells += [_pruned_row(config, cell.label, cell.run) for cell in swept]
    report = stages.sweep("sweep report", settings=SweepSettings(as_shown(config)), cells=cells)
    if len(models) > 1:
        return Graph(report)
    (own,) = models.values()  # without its dense model no cell says anything
    prompts = _prompts(config, own)
    first = steps.check_answers(own, prompts, *prompts.evaluation)
    return Graph(report, first if run.ahead else [*first, *nodes_in(dense)])


def _dense_row(config: SweepConfig, label: str, run_config: RunConfig, tuned: bool = False) -> Row:
    """Measure a dense model, as it is or `tuned` on the shots of a cell."""
    prompts = _prompts(config, run_config)
    dense = model = steps.measure(run_config, "dense", steps.load_dense(run_config), prompts)
    if tuned:
        model = replace(dense, scores=steps.tune_dense(run_config, dense.checkpoint, prompts).scores)
    return SweptCell(label, 0.0, run_config.seed, model, dense)


def _pruned_row(config: SweepConfig, name: str, run_config: RunConfig) -> Row:
    """Prune and tune the model of a cell as configured, and measure it."""
    (ratio,) = run_config.pruning.ratios
    label = f"{name} @ {ratio:g}"
    prompts = _prompts(config, run_config)
    dense = steps.prepare_dense(run_config, prompts)
    pruned = steps.prune_to(run_config, dense, ratio, prompts)
    perplexity = steps.measure_perplexity(run_config, label, pruned, dense.checkpoint)
    adapters = steps.tune_adapters(run_config, ratio, pruned, prompts) if config.tailored else {}
    scores = steps.score_all(run_config, label, pruned, prompts, adapters) if prompts.evaluation else {}
    model = MeasuredModel(pruned, perplexity, scores)
    measured = steps.measure(run_config, "dense", dense.checkpoint, prompts)
    return SweptCell(name, ratio, run_config.seed, model, measured)


def _prompts(config: SweepConfig, run_config: RunConfig) -> Prompts:
    """The prompts of a cell; those to score only if the sweep scores any. What nothing reads is not rendered."""
    prompts = steps.render_all(run_config)
    return prompts if config.scored or config.tailored else replace(prompts, evaluation={})
