"""Stage: score a checkpoint on a benchmark."""

from prefect import State

from tailored_llama.config import SOFT, RunConfig, named_benchmark
from tailored_llama.data import PromptSplit
from tailored_llama.evaluation import scoring
from tailored_llama.store import ArtifactRef
from tasks._stage import execution_of, open_store, stage, task


@task("score {benchmark} {label}", on_device=True, frugal=True)
def score(
    config: RunConfig,
    benchmark: str,
    label: str,
    checkpoint: ArtifactRef,
    prompts: ArtifactRef,
    adapter: ArtifactRef | None = None,
    split: PromptSplit = "evaluation",
) -> State[ArtifactRef]:
    store, own = open_store(config.store), named_benchmark(config, benchmark)
    return stage(
        scoring,
        config.store,
        scoring.key_fields(own, split, merged=adapter is not None and config.tuning.variant not in SOFT),
        {"checkpoint": checkpoint, "prompts": prompts} | ({"adapter": adapter} if adapter else {}),
        lambda out, progress: scoring.score_benchmark(
            store.open(checkpoint),
            store.open(adapter) if adapter else None,
            store.open(prompts),
            benchmark=own,
            split=split,
            out=out,
            execution=execution_of(config),
            progress=progress,
        ),
        on=config,
        short=True,
    )
