"""Stages: choose a template set, and write the report of a prompt study."""

from collections.abc import Mapping, Sequence

from prefect import State, get_run_logger
from prefect.states import Completed

from tailored_llama.config import BenchmarkConfig, PromptStudyConfig, StoreConfig
from tailored_llama.data import candidates, study_templates
from tailored_llama.evaluation import Studied, choose
from tailored_llama.reports import prompt_study, study_settings
from tailored_llama.store import ArtifactRef
from tasks._pages import show_report
from tasks._results import StudiedBenchmark
from tasks._stage import open_store, reference, stage, task
from tasks.report import folders

__all__ = ["candidates", "choose_template", "study_templates", "write_study"]


@task("choose {benchmark}")
def choose_template(store: StoreConfig, benchmark: str, scores: Mapping[str, Sequence[ArtifactRef]]) -> State[str]:
    """The name of the set with the highest score."""
    chosen = choose({name: [open_store(store).open(ref) for ref in refs] for name, refs in scores.items()})
    get_run_logger().info("%s: %s", benchmark, chosen)
    return Completed(data=chosen)


@task("prompt study report")
def write_study(config: PromptStudyConfig, model: str, studied: Mapping[str, StudiedBenchmark]) -> State[ArtifactRef]:
    """Write the report; `model` describes the scored model, `studied` is by benchmark."""
    store = open_store(config.store)

    def opened(benchmark: BenchmarkConfig) -> Studied:
        one = studied[benchmark.name]
        parts = (folders(store, refs) for refs in (one.selection, one.evaluation, one.prompts))
        return Studied(benchmark, one.chosen, *parts)

    inputs = {
        f"{name} {part} {template}": ref
        for name, one in studied.items()
        for part, refs in (("selection", one.selection), ("evaluation", one.evaluation), ("prompts", one.prompts))
        for template, ref in refs.items()
    }
    fields = {"settings": study_settings(config), "model": model, "chosen": [one.chosen for one in studied.values()]}
    state = stage(
        prompt_study,
        config.store,
        fields,
        inputs,
        lambda out, progress: prompt_study.write_study(config, model, [opened(b) for b in config.benchmarks], out=out),
    )
    show_report(store, reference(state), "study", "prompt-study", "Chosen prompts and references")
    return state
