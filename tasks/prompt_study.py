"""Stages: the choice of a template set, and the report of a prompt study."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefect import get_run_logger
from prefect.states import State

from tailored_llama import prompt_pages, prompt_study
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import StoreConfig
from tailored_llama.prompt_study import PromptStudyConfig, Studied
from tasks._pages import show_report
from tasks._stage import open_store, stage, task

VERSION = 2


@task("choose {benchmark}")
def choose_template(store: StoreConfig, benchmark: str, scores: Mapping[str, Sequence[ArtifactRef]]) -> str:
    """The name of the set with the highest score."""
    chosen = prompt_study.choose({name: [open_store(store).open(r) for r in refs] for name, refs in scores.items()})
    get_run_logger().info("%s: %s", benchmark, chosen)
    return chosen


@task("prompt study report")
def write_study(config: PromptStudyConfig, model: str, made: Sequence[Mapping[str, Any]]) -> State[ArtifactRef]:
    """Write the report.

    Args:
        config: the study's.
        model: what was scored, in words.
        made: of every benchmark "chosen", the name of a template set, and by such names "selection" and "evaluation"
            (scores) and "prompts" (of the evaluation split).
    """
    store = open_store(config.store)

    def opened(refs: Mapping[str, ArtifactRef]) -> dict[str, Any]:
        return {name: store.open(ref) for name, ref in refs.items()}

    parts = ("selection", "evaluation", "prompts")
    names = [benchmark.name for benchmark in config.benchmarks]
    inputs = {
        f"{name} {part} {template}": ref
        for name, one in zip(names, made, strict=True)
        for part in parts
        for template, ref in one[part].items()
    }
    slice_ = {
        "settings": prompt_pages.study_settings(config),
        "model": model,
        "chosen": [one["chosen"] for one in made],
    }
    state = stage(
        config.store,
        "prompt-study",
        VERSION,
        slice_,
        inputs,
        lambda out: prompt_pages.write_study(
            config,
            model,
            [
                Studied(benchmark, one["chosen"], *(opened(one[part]) for part in parts))
                for benchmark, one in zip(config.benchmarks, made, strict=True)
            ],
            out,
        ),
    )
    show_report(store, state.data, "study", "prompt-study", "Chosen prompts and references")
    return state
