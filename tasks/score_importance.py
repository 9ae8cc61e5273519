"""Stage: the importance of every coupled group."""

from prefect.states import State

from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import DATA_FREE, RunConfig
from tailored_llama.pruning import importance
from tasks._progress import stage_progress
from tasks._stage import OnDevice, execution_of, open_store, stage, task

VERSION = 3


@task("importance {config.pruning.criterion}", frugal=True)
def score_importance(
    config: RunConfig, dense: ArtifactRef, calibration: ArtifactRef | None, groups: ArtifactRef
) -> State[ArtifactRef]:
    """Criteria that read no calibration text do not depend on it."""
    store, criterion = open_store(config.store), config.pruning.criterion
    calibration = None if criterion in DATA_FREE else calibration
    inputs = {"dense": dense, "groups": groups}
    slice_ = {"criterion": criterion}
    if calibration is not None:
        inputs["calibration"] = calibration
    if criterion in ("random", "taylor_gate"):  # which draw
        slice_["seed"] = config.seed
    with stage_progress(f"importance {criterion}") as progress:
        return stage(
            config.store,
            "importance",
            VERSION,
            slice_,
            inputs,
            lambda out: importance.score_importance(
                store.open(dense),
                store.open(calibration) if calibration else None,
                store.open(groups),
                criterion,
                config.seed,
                out,
                config.execution.device,
                progress,
                execution_of(config).batch_tokens,
            ),
            OnDevice(config, "importance", {}),
        )
