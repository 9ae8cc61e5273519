"""Stage: search for the width of every layer's attention and MLP."""

from collections.abc import Mapping

from prefect import State

from tailored_llama.config import RunConfig
from tailored_llama.models import read_structure
from tailored_llama.pruning import allocation
from tailored_llama.store import ArtifactRef
from tasks._stage import execution_of, open_store, stage, task


@task("search @ {ratio:.2f}", on_device=True, frugal=True)
def search_widths(
    config: RunConfig,
    ratio: float,
    model: ArtifactRef,
    groups: ArtifactRef,
    importance: ArtifactRef,
    calibration: ArtifactRef,
    prompts: Mapping[str, ArtifactRef],
    counts: ArtifactRef | None = None,
) -> State[ArtifactRef]:
    """`prompts` are train prompts, by name; evaluation prompts must not be among them.

    `counts` of tokens are read by the kind vocabulary.
    """
    store = open_store(config.store)
    parameters = read_structure(store.open(model)).parameters
    return stage(
        allocation,
        config.store,
        allocation.key_fields(config, ratio, parameters),
        {"dense": model, "groups": groups, "importance": importance, "calibration": calibration}
        | {f"prompts {name}": ref for name, ref in prompts.items()}
        | ({"counts": counts} if counts else {}),
        lambda out, progress: allocation.search_widths(
            store.open(model),
            store.open(groups),
            store.open(importance),
            store.open(calibration),
            [store.open(ref) for ref in prompts.values()],
            ratio=ratio,
            pruning=config.pruning,
            reconstruction=config.reconstruction,
            seed=config.seed,
            counts=store.open(counts) if counts else None,
            out=out,
            execution=execution_of(config),
            progress=progress,
        ),
        on=config,
    )
