"""Choose a template set for every benchmark on a slice of its train split; report it on the evaluation split."""

from __future__ import annotations

from prefect import flow

from flows._command import Command, check_deployed, run_name
from flows._steps import Prompts, heal_if_asked, prepare_dense, prune_to, render_all
from tailored_llama.config import REFERENCES, BenchmarkConfig, PromptStudyConfig, reads_prompts, with_template
from tailored_llama.preflight import preflight_prompts
from tailored_llama.reports import study_table
from tailored_llama.store import ArtifactRef
from tasks._results import StudiedBenchmark
from tasks.load_benchmark import load_benchmark
from tasks.load_model import load_model
from tasks.prompt_study import candidates, choose_template, study_templates, write_study
from tasks.render_prompts import render_prompts
from tasks.score import score


@flow(name="prompts", flow_run_name=run_name, persist_result=False)
def prompts(config: PromptStudyConfig) -> ArtifactRef:
    """Score every template set on a train slice, choose one, and compare it with the references."""
    check_deployed(preflight_prompts, config)
    examples = {b.name: load_benchmark(config.store, b) for b in config.benchmarks}
    slices = {
        b.name: {
            name: render_prompts(with_template(config, source), b.name, "selection", examples[b.name], config.examples)
            for name, source in candidates(config.templates, b).items()
        }
        for b in config.benchmarks
    }
    checkpoint, model = _checkpoint(config)
    studied = {b.name: _studied(config, b, examples[b.name], slices[b.name], checkpoint) for b in config.benchmarks}
    return write_study(config, model, studied)


def _checkpoint(config: PromptStudyConfig) -> tuple[ArtifactRef, str]:
    """The checkpoint to score, and its description."""
    if not config.pruned:
        return load_model(config.store, config.model), config.model.source
    (ratio,) = config.pruning.ratios
    run_prompts = render_all(config) if reads_prompts(config) else Prompts()
    dense = prepare_dense(config, run_prompts)
    model = heal_if_asked(config, dense, ratio, prune_to(config, dense, ratio), run_prompts)
    return model, f"{config.model.source}, pruned{' and healed' if config.healing.tokens else ''} at ratio {ratio:g}"


def _studied(
    config: PromptStudyConfig,
    benchmark: BenchmarkConfig,
    examples: ArtifactRef,
    slices: dict[str, ArtifactRef],
    checkpoint: ArtifactRef,
) -> StudiedBenchmark:
    """Choose the template set of one benchmark on the train slice; score it and the references."""
    name, source = benchmark.name, study_templates(config, benchmark)
    selection = {
        template: score(config, name, f"{template}, selection", checkpoint, rendered, split="selection")
        for template, rendered in slices.items()
    }
    chosen = choose_template(config.store, name, {template: [ref] for template, ref in selection.items()})
    reported = dict.fromkeys([chosen, *REFERENCES])
    asked = {t: render_prompts(with_template(config, source[t]), name, "evaluation", examples) for t in reported}
    evaluation = {t: score(config, name, t, checkpoint, asked[t]) for t in reported}
    return StudiedBenchmark(chosen, selection, evaluation, asked)


COMMAND = Command(prompts, preflight_prompts, study_table, "study.html")

if __name__ == "__main__":
    raise SystemExit("error: got python -m flows.prompts; allowed: python -m flows prompts CONFIG.toml")
