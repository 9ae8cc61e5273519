"""The studies: sweeps over a grid of settings, transfer between benchmarks, and the choice of prompts."""

from dataclasses import replace

from tailored_llama import data, evaluation
from tailored_llama.config import (
    DENSE,
    GENERIC,
    REFERENCES,
    UNREAD_BY_TRANSFER,
    UNTUNED_MODEL,
    BenchmarkConfig,
    PromptStudyConfig,
    RunConfig,
    SweepConfig,
    TransferConfig,
    as_shown,
    dense_runs,
    reads_prompts,
    sweep_cells,
    trims_vocabulary,
    tuned_dense_cells,
    with_template,
)
from tailored_llama.evaluation import MeasuredModel, StudiedBenchmark, SweptCell, TransferScore
from tailored_llama.pipeline import stages, steps
from tailored_llama.pipeline.executor import Executor
from tailored_llama.pipeline.graph import Artifact, Graph, nodes_in
from tailored_llama.pipeline.reporting import ReportSettings, StudySettings, SweepSettings
from tailored_llama.pipeline.steps import Prompts

Row = SweptCell[Artifact]


def sweep(run: Executor, config: SweepConfig) -> Graph:
    """Prune a model by every combination of a grid of settings, and measure each, and every dense model.

    A failure appears in the table, and stops no other cell. With `tuning.dense`, dense models are also tuned on the
    shots of the cells.
    """
    swept = sweep_cells(config)
    models, tuned = dense_runs(config, swept), tuned_dense_cells(config, swept)
    dense = [_dense_row(config, own, SweptCell(label, 0.0, own.seed)) for label, own in models.items()]
    cells = list(dense)
    for cell in tuned:
        row: Row = SweptCell(cell.label, 0.0, cell.run.seed, cell.curve, cell.place)
        cells.append(_dense_row(config, cell.run, row, tuned=True))
    for cell in swept:
        row = SweptCell(cell.label, cell.run.pruning.ratios[0], cell.run.seed, cell.curve, cell.place)
        cells.append(_pruned_row(config, cell.run, row))
    report = stages.sweep("sweep report", settings=SweepSettings(as_shown(config)), cells=cells)
    if len(models) > 1:
        return Graph(report)
    (own,) = models.values()  # without its dense model no cell says anything
    prompts = _prompts(config, own)
    first = steps.check_answers(own, prompts, *prompts.shots)
    return Graph(report, first if run.ahead else [*first, *nodes_in(dense)])


def _dense_row(config: SweepConfig, run_config: RunConfig, row: Row, tuned: bool = False) -> Row:
    """Measure a dense model, as it is or `tuned` on the shots of a cell."""
    prompts = _prompts(config, run_config)
    dense = model = steps.measure(run_config, "dense", steps.load_dense(run_config), prompts)
    if tuned:
        model = replace(dense, scores=steps.tune_dense(run_config, dense.checkpoint, prompts).scores)
    return replace(row, model=model, dense=dense)


def _pruned_row(config: SweepConfig, run_config: RunConfig, row: Row) -> Row:
    """Prune, heal and tune the model of a cell as configured, and measure it."""
    ratio, label = row.ratio, f"{row.name} @ {row.ratio:g}"
    prompts = _prompts(config, run_config)
    dense = steps.prepare_dense(run_config, prompts)
    pruned = steps.prune_to(run_config, dense, ratio, prompts)
    healed = steps.heal_if_asked(run_config, dense.checkpoint, ratio, pruned, prompts)
    perplexity = steps.measure_perplexity(run_config, label, healed, dense.checkpoint)
    adapters = steps.tune_adapters(run_config, ratio, healed, prompts) if config.tailored else {}
    scores = steps.score_all(run_config, label, healed, prompts, adapters) if prompts.evaluation else {}
    model = MeasuredModel(healed, perplexity, scores)
    return replace(row, model=model, dense=steps.measure(run_config, "dense", dense.checkpoint, prompts))


def _prompts(config: SweepConfig, run_config: RunConfig) -> Prompts:
    """The prompts of a cell, if anything reads them; those to score only if the sweep scores any."""
    if config.scored or config.tailored:
        return steps.render_all(run_config)
    needed = reads_prompts(run_config) or trims_vocabulary(run_config)
    return replace(steps.render_all(run_config), evaluation={}) if needed else Prompts()


def transfer(run: Executor, config: TransferConfig) -> Graph:
    """Prune a model at one ratio, tailor it to each benchmark, and score every adapter on all benchmarks.

    A failure appears in the table, and stops no other cell.
    """
    (ratio,) = config.pruning.ratios
    names = [benchmark.name for benchmark in config.benchmarks]
    prompts = steps.render_all(config)
    dense = steps.prepare_dense(config, prompts)
    pruned = steps.heal_if_asked(
        config, dense.checkpoint, ratio, steps.prune_to(config, dense, ratio, prompts), prompts
    )
    mixed = config.model_copy(update={"tuning": config.tuning.model_copy(update={"examples": "mixture"})})
    # One adapter for all benchmarks is tuned with the generic template.
    tuned = {GENERIC: steps.tune(mixed, names, ratio, pruned, steps.render_all(mixed))}
    tuned |= {name: steps.tune(config, [name], ratio, pruned, prompts) for name in names}

    def scored(model: str, benchmark: str) -> TransferScore[Artifact]:
        checkpoint, adapter = dense.checkpoint if model == DENSE else pruned, tuned.get(model)
        label, asked = f"tuned on {model}" if adapter else model, prompts.evaluation[benchmark]
        return TransferScore(model, benchmark, steps.score(config, benchmark, label, checkpoint, asked, adapter))

    scores = [scored(model, name) for model in (DENSE, UNTUNED_MODEL, *tuned) for name in names]
    settings = ReportSettings(as_shown(config, UNREAD_BY_TRANSFER))
    report = stages.transfer("transfer report", settings=settings, scores=scores)
    return Graph(report, steps.checks(config, dense, prompts))


def prompts(run: Executor, config: PromptStudyConfig) -> Graph:
    """Choose a template set for every benchmark on a slice of its train split; report it on the evaluation split."""
    examples = {benchmark.name: steps.load_examples(benchmark) for benchmark in config.benchmarks}
    slices = {own.name: _render_slices(config, own, examples[own.name]) for own in config.benchmarks}
    checkpoint, model = _studied_model(config)
    chosen_by = {
        name: {
            template: steps.score(config, name, f"{template}, selection", checkpoint, asked, split="selection")
            for template, asked in of.items()
        }
        for name, of in slices.items()
    }
    run.begin(chosen_by)
    studied = []
    for benchmark in config.benchmarks:
        name, source = benchmark.name, data.study_templates(config, benchmark)
        selection = chosen_by[name]
        chosen = evaluation.choose({template: run.open(scores) for template, scores in selection.items()})
        asked, scored = {}, {}
        for template in dict.fromkeys([chosen, *REFERENCES]):
            worded = with_template(config, source[template])
            asked[template] = steps.render(worded, name, "evaluation", examples[name])
            scored[template] = steps.score(config, name, template, checkpoint, asked[template])
        studied.append(StudiedBenchmark[Artifact](name, chosen, selection, scored, asked))
    settings = StudySettings(as_shown(config), model)
    return Graph(stages.study("prompt study report", settings=settings, studied=studied))


def _render_slices(config: PromptStudyConfig, benchmark: BenchmarkConfig, examples: Artifact) -> dict[str, Artifact]:
    """The prompts to choose by, from every template set."""
    return {
        name: steps.render(with_template(config, source), benchmark.name, "selection", examples, config.examples)
        for name, source in data.candidates(config.templates, benchmark).items()
    }


def _studied_model(config: PromptStudyConfig) -> tuple[Artifact, str]:
    """The checkpoint to score, and its description."""
    if not config.pruned:
        return steps.load_dense(config), config.model.source
    (ratio,) = config.pruning.ratios
    read = steps.render_all(config) if reads_prompts(config) or trims_vocabulary(config) else Prompts()
    dense = steps.prepare_dense(config, read)
    pruned = steps.prune_to(config, dense, ratio, read)
    model = steps.heal_if_asked(config, dense.checkpoint, ratio, pruned, read)
    return model, f"{config.model.source}, pruned{' and healed' if config.healing.tokens else ''} at ratio {ratio:g}"
