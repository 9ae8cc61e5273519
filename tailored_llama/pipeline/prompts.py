"""Choose a template set for every benchmark on a slice of its train split; report it on the evaluation split."""

from __future__ import annotations

from tailored_llama import evaluation
from tailored_llama.config import (
    REFERENCES,
    BenchmarkConfig,
    PromptStudyConfig,
    as_shown,
    reads_prompts,
    trims_vocabulary,
    with_template,
)
from tailored_llama.data import candidates, study_templates
from tailored_llama.evaluation import StudiedBenchmark
from tailored_llama.pipeline import stages, steps
from tailored_llama.pipeline.futures import Artifact, conclude
from tailored_llama.pipeline.reporting import StudySettings
from tailored_llama.pipeline.runner import Runner
from tailored_llama.pipeline.steps import Prompts
from tailored_llama.store import ArtifactRef


def prompts(run: Runner, config: PromptStudyConfig) -> ArtifactRef:
    """Score every template set on a train slice, choose one, and compare it with the references."""
    examples = {b.name: steps.load_examples(run, b) for b in config.benchmarks}
    slices = {
        b.name: {
            name: steps.render(
                run, with_template(config, source), b.name, "selection", examples[b.name], config.examples
            )
            for name, source in candidates(config.templates, b).items()
        }
        for b in config.benchmarks
    }
    checkpoint, model = _checkpoint(run, config)
    studied = [_studied(run, config, b, (examples[b.name], slices[b.name]), checkpoint) for b in config.benchmarks]
    settings = StudySettings(as_shown(config), model)
    return conclude(run(stages.STUDY, settings, "prompt study report", studied=studied), {})


def _checkpoint(run: Runner, config: PromptStudyConfig) -> tuple[Artifact, str]:
    """The checkpoint to score, and its description."""
    if not config.pruned:
        return steps.load_dense(run, config), config.model.source
    (ratio,) = config.pruning.ratios
    read = steps.render_all(run, config) if reads_prompts(config) or trims_vocabulary(config) else Prompts()
    dense = steps.prepare_dense(run, config, read)
    pruned = steps.prune_to(run, config, dense, ratio, read)
    model = steps.heal_if_asked(run, config, dense.checkpoint, ratio, pruned, read)
    return model, f"{config.model.source}, pruned{' and healed' if config.healing.tokens else ''} at ratio {ratio:g}"


def _studied(
    run: Runner,
    config: PromptStudyConfig,
    benchmark: BenchmarkConfig,
    rendered: tuple[Artifact, dict[str, Artifact]],
    checkpoint: Artifact,
) -> StudiedBenchmark[Artifact]:
    """Choose the template set of one benchmark on the train slice; score it and the references.

    `rendered` are the examples, and the prompts of the slice by template set.
    """
    name, source = benchmark.name, study_templates(config, benchmark)
    examples, slices = rendered
    selection = {
        template: steps.score(run, config, name, f"{template}, selection", checkpoint, asked, split="selection")
        for template, asked in slices.items()
    }
    chosen = evaluation.choose({template: [run.open(scores)] for template, scores in selection.items()})
    reported = dict.fromkeys([chosen, *REFERENCES])
    asked = {t: steps.render(run, with_template(config, source[t]), name, "evaluation", examples) for t in reported}
    scored = {t: steps.score(run, config, name, t, checkpoint, asked[t]) for t in reported}
    return StudiedBenchmark(name, chosen, selection, scored, asked)
