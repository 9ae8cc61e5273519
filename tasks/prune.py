"""Stage: the plan and the pruned checkpoint."""

from prefect.states import State

from tailored_llama.artifacts import ArtifactRef
from tailored_llama.checkpoints import read_structure
from tailored_llama.config import RunConfig
from tailored_llama.pruning import prune as pruning
from tasks._progress import stage_progress
from tasks._stage import OnDevice, execution_of, open_store, stage, task

VERSION = 3


@task("prune @ {ratio:.2f}", frugal=True)
def prune(
    config: RunConfig,
    ratio: float,
    model: ArtifactRef,
    groups: ArtifactRef,
    importance: ArtifactRef,
    calibration: ArtifactRef | None,
    dense: ArtifactRef,
) -> State[ArtifactRef]:
    """`ratio` counts from the parameters of `dense`; without reconstruction, nothing depends on `calibration`."""
    artifacts, fitted = open_store(config.store), config.reconstruction
    original = read_structure(artifacts.open(dense)).parameters
    slice_ = config.pruning.model_dump(mode="json", exclude={"ratios"})
    slice_ |= {"ratio": ratio, "original": original, "reconstruction": fitted.method}
    inputs = {"dense": model, "groups": groups, "importance": importance}
    if fitted.method == "none":
        calibration = None
    if calibration is not None:
        slice_["ridge"] = fitted.ridge
        if fitted.method == "sequential":
            slice_["fitted"] = "every projection"  # artifacts without it: o_proj and down_proj alone
        inputs["calibration"] = calibration
    with stage_progress(f"prune @ {ratio:.3g}") as progress:
        return stage(
            config.store,
            "pruned",
            VERSION,
            slice_,
            inputs,
            lambda out: pruning.prune(
                artifacts.open(model),
                artifacts.open(groups),
                artifacts.open(importance),
                ratio,
                config.pruning,
                fitted,
                artifacts.open(calibration) if calibration else None,
                out,
                original,
                config.execution.device,
                progress,
                execution_of(config).batch_tokens,
            ),
            OnDevice(config, "prune", {"ratio": ratio}),
        )
