"""The studies: sweeps over a grid of settings, transfer between benchmarks, and the choice of prompts."""

from dataclasses import replace
from functools import partial

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
from tailored_llama.pipeline.futures import Artifact, Failed, attempt, report_or_raise, wait_for_rows
from tailored_llama.pipeline.reporting import ReportSettings, StudySettings, SweepSettings
from tailored_llama.pipeline.runner import Runner
from tailored_llama.pipeline.steps import Prompts
from tailored_llama.store import ArtifactRef

Row = SweptCell[Artifact]


def sweep(run: Runner, config: SweepConfig) -> ArtifactRef:
    """Prune a model by every combination of a grid of settings, and measure each, and every dense model.

    A failure appears in the table, stops no other cell, and is raised at the end, as IncompleteRun. With
    `tuning.dense`, dense models are also tuned on the shots of the cells.
    """
    cells = sweep_cells(config)
    models, tuned = dense_runs(config, cells), tuned_dense_cells(config, cells)
    attempts: list[tuple[str, Row, Row | Failed]] = []
    for label, run_config in models.items():
        row: Row = SweptCell(label, 0.0, run_config.seed)
        measured = attempt(label, partial(_dense_row, run, config, run_config, row))
        if isinstance(measured, Failed) and len(models) == 1:  # then no cell can be measured
            raise measured.error
        attempts.append((label, row, measured))
    for cell in tuned:
        row = SweptCell(cell.label, 0.0, cell.run.seed, cell.curve, cell.place)
        name, build = f"{row.name}, seed {row.seed}", partial(_dense_row, run, config, cell.run, row, tuned=True)
        attempts.append((name, row, attempt(name, build)))
    for cell in cells:
        row = SweptCell(cell.label, cell.run.pruning.ratios[0], cell.run.seed, cell.curve, cell.place)
        name = f"cell {row.name} @ {row.ratio:g}, seed {row.seed}"
        attempts.append((name, row, attempt(name, partial(_pruned_row, run, config, cell.run, row))))
    rows, failed = wait_for_rows(attempts)
    return report_or_raise(run(stages.SWEEP, SweepSettings(as_shown(config)), "sweep report", cells=rows), failed)


def _dense_row(run: Runner, config: SweepConfig, run_config: RunConfig, row: Row, tuned: bool = False) -> Row:
    """Measure a dense model, as it is or `tuned` on the shots of a cell."""
    prompts = _prompts(run, config, run_config)
    loaded = steps.load_dense(run, run_config)
    steps.check_answers(run, run_config, loaded, prompts)
    dense = model = steps.measure(run, run_config, "dense", loaded, prompts)
    if tuned:
        model = replace(dense, scores=steps.tune_dense(run, run_config, dense.checkpoint, prompts).scores)
    return replace(row, model=model, dense=dense)


def _pruned_row(run: Runner, config: SweepConfig, run_config: RunConfig, row: Row) -> Row:
    """Prune, heal and tune the model of a cell as configured, and measure it."""
    ratio, label = row.ratio, f"{row.name} @ {row.ratio:g}"
    prompts = _prompts(run, config, run_config)
    dense = steps.prepare_dense(run, run_config, prompts)
    pruned = steps.prune_to(run, run_config, dense, ratio, prompts)
    healed = steps.heal_if_asked(run, run_config, dense.checkpoint, ratio, pruned, prompts)
    perplexity = steps.measure_perplexity(run, run_config, label, healed, dense.checkpoint)
    adapters = steps.tune_adapters(run, run_config, ratio, healed, prompts) if config.tailored else {}
    scores = steps.score_all(run, run_config, label, healed, prompts, adapters) if prompts.evaluation else {}
    model = MeasuredModel(healed, perplexity, scores)
    return replace(row, model=model, dense=steps.measure(run, run_config, "dense", dense.checkpoint, prompts))


def _prompts(run: Runner, config: SweepConfig, run_config: RunConfig) -> Prompts:
    """The prompts of a cell, if anything reads them; those to score only if the sweep scores any."""
    if config.scored or config.tailored:
        return steps.render_all(run, run_config)
    needed = reads_prompts(run_config) or trims_vocabulary(run_config)
    return replace(steps.render_all(run, run_config), evaluation={}) if needed else Prompts()


def transfer(run: Runner, config: TransferConfig) -> ArtifactRef:
    """Prune a model at one ratio, tailor it to each benchmark, and score every adapter on all benchmarks.

    A failure appears in the table, stops no other cell, and is raised at the end, as IncompleteRun.
    """
    (ratio,) = config.pruning.ratios
    names = [benchmark.name for benchmark in config.benchmarks]
    prompts = steps.render_all(run, config)
    dense = steps.prepare_dense(run, config, prompts)
    pruned = steps.prune_to(run, config, dense, ratio, prompts)
    pruned = steps.heal_if_asked(run, config, dense.checkpoint, ratio, pruned, prompts)

    def tune_generic() -> Artifact:
        """One adapter for all benchmarks, tuned with the generic template."""
        mixed = config.model_copy(update={"tuning": config.tuning.model_copy(update={"examples": "mixture"})})
        return steps.tune(run, mixed, names, ratio, pruned, steps.render_all(run, mixed))

    tuned = {GENERIC: attempt(GENERIC, tune_generic)}
    for tuned_on in names:
        tuned[tuned_on] = attempt(tuned_on, partial(steps.tune, run, config, [tuned_on], ratio, pruned, prompts))

    def scored(row: TransferScore[Artifact]) -> TransferScore[Artifact]:
        checkpoint, adapter = dense.checkpoint if row.model == DENSE else pruned, tuned.get(row.model)
        label, asked = f"tuned on {row.model}" if adapter else row.model, prompts.evaluation[row.benchmark]
        if isinstance(adapter, Failed):
            raise adapter.error
        return replace(row, scores=steps.score(run, config, row.benchmark, label, checkpoint, asked, adapter))

    cells = [TransferScore[Artifact](model, name) for model in (DENSE, UNTUNED_MODEL, *tuned) for name in names]
    scores, failed = wait_for_rows([(cell.label, cell, attempt(cell.label, partial(scored, cell))) for cell in cells])
    settings = ReportSettings(as_shown(config, UNREAD_BY_TRANSFER))
    return report_or_raise(run(stages.TRANSFER, settings, "transfer report", scores=scores), failed)


def prompts(run: Runner, config: PromptStudyConfig) -> ArtifactRef:
    """Choose a template set for every benchmark on a slice of its train split; report it on the evaluation split."""
    examples = {b.name: steps.load_examples(run, b) for b in config.benchmarks}
    slices = {b.name: _render_slices(run, config, b, examples[b.name]) for b in config.benchmarks}
    checkpoint, model = _studied_model(run, config)
    studied = []
    for benchmark in config.benchmarks:
        name, source = benchmark.name, data.study_templates(config, benchmark)
        selection = {
            template: steps.score(run, config, name, f"{template}, selection", checkpoint, asked, split="selection")
            for template, asked in slices[name].items()
        }
        chosen = evaluation.choose({template: run.open(scores) for template, scores in selection.items()})
        asked, scored = {}, {}
        for template in dict.fromkeys([chosen, *REFERENCES]):
            worded = with_template(config, source[template])
            asked[template] = steps.render(run, worded, name, "evaluation", examples[name])
            scored[template] = steps.score(run, config, name, template, checkpoint, asked[template])
        studied.append(StudiedBenchmark(name, chosen, selection, scored, asked))
    settings = StudySettings(as_shown(config), model)
    return report_or_raise(run(stages.STUDY, settings, "prompt study report", studied=studied), {})


def _render_slices(
    run: Runner, config: PromptStudyConfig, benchmark: BenchmarkConfig, examples: Artifact
) -> dict[str, Artifact]:
    """The prompts to choose by, from every template set."""
    return {
        name: steps.render(run, with_template(config, source), benchmark.name, "selection", examples, config.examples)
        for name, source in data.candidates(config.templates, benchmark).items()
    }


def _studied_model(run: Runner, config: PromptStudyConfig) -> tuple[Artifact, str]:
    """The checkpoint to score, and its description."""
    if not config.pruned:
        return steps.load_dense(run, config), config.model.source
    (ratio,) = config.pruning.ratios
    read = steps.render_all(run, config) if reads_prompts(config) or trims_vocabulary(config) else Prompts()
    dense = steps.prepare_dense(run, config, read)
    pruned = steps.prune_to(run, config, dense, ratio, read)
    model = steps.heal_if_asked(run, config, dense.checkpoint, ratio, pruned, read)
    return model, f"{config.model.source}, pruned{' and healed' if config.healing.tokens else ''} at ratio {ratio:g}"
