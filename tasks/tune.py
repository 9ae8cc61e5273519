"""Stage: one LoRA adapter for one benchmark."""

from prefect import task
from prefect.states import State

from tailored_llama import tuning
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.benchmarks import headline_metric
from tailored_llama.config import RunConfig
from tailored_llama.console import progress_bar
from tasks._stage import open_store, stage

VERSION = 3


@task(task_run_name="tune {benchmark} @ {ratio}")
def tune(
    config: RunConfig, benchmark: str, ratio: float, pruned: ArtifactRef, prompts: ArtifactRef
) -> State[ArtifactRef]:
    store = open_store(config.store)
    metric = headline_metric(next(own for own in config.benchmarks if own.name == benchmark))
    slice_ = {**config.tuning.model_dump(mode="json", exclude={"shots", "held_out"}), "seed": config.seed}
    if config.tuning.ranking:
        slice_["metric"] = metric
    with progress_bar(f"tune {benchmark} @ {ratio}") as progress:
        return stage(
            config.store,
            "adapter",
            VERSION,
            slice_,
            {"pruned": pruned, "prompts": prompts},
            lambda out: tuning.tune(
                store.open(pruned),
                store.open(prompts),
                config.tuning,
                metric,
                config.seed,
                out,
                config.execution,
                progress,
            ),
        )
