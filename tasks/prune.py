"""Stage: the plan and the pruned checkpoint."""

from prefect import task
from prefect.states import State

from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import PruningConfig, StoreConfig
from tailored_llama.pruning import plan
from tasks._stage import open_store, stage

VERSION = 1


@task(task_run_name="prune @ {ratio}")
def prune(
    store: StoreConfig,
    pruning: PruningConfig,
    ratio: float,
    dense: ArtifactRef,
    groups: ArtifactRef,
    importance: ArtifactRef,
) -> State[ArtifactRef]:
    artifacts = open_store(store)
    return stage(
        store,
        "pruned",
        VERSION,
        {"ratio": ratio, **pruning.model_dump(mode="json", exclude={"ratios", "criterion"})},
        {"dense": dense, "groups": groups, "importance": importance},
        lambda out: plan.prune(
            artifacts.open(dense), artifacts.open(groups), artifacts.open(importance), ratio, pruning, out
        ),
    )
