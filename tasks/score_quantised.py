"""Stage: score a model with the weights of its GGUF file."""

from prefect import State

from tailored_llama.config import GgufType, RunConfig, named_benchmark
from tailored_llama.serving import quantised
from tailored_llama.store import ArtifactRef
from tasks._stage import execution_of, open_store, stage, task


@task("score {benchmark} {label}, {gguf_type}", on_device=True, frugal=True)
def score_quantised(
    config: RunConfig,
    benchmark: str,
    label: str,
    gguf_type: GgufType,
    checkpoint: ArtifactRef,
    prompts: ArtifactRef,
    adapter: ArtifactRef | None = None,
) -> State[ArtifactRef]:
    store, own = open_store(config.store), named_benchmark(config, benchmark)
    return stage(
        quantised,
        config.store,
        quantised.key_fields(own, gguf_type, merged=adapter is not None),
        {"checkpoint": checkpoint, "prompts": prompts} | ({"adapter": adapter} if adapter else {}),
        lambda out, progress: quantised.score_quantised(
            store.open(checkpoint),
            store.open(adapter) if adapter else None,
            store.open(prompts),
            gguf_type=gguf_type,
            benchmark=own,
            out=out,
            execution=execution_of(config),
            progress=progress,
        ),
        on=config,
    )
