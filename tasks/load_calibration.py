"""Stage: load the token sequences for importance and reconstruction."""

from collections.abc import Mapping

from prefect import State

from tailored_llama.config import PROMPTS, RunConfig
from tailored_llama.data import calibration
from tailored_llama.store import ArtifactRef
from tasks._stage import open_store, stage, task


@task("load calibration {config.calibration.named}")
def load_calibration(config: RunConfig, dense: ArtifactRef, prompts: Mapping[str, ArtifactRef]) -> State[ArtifactRef]:
    """`prompts` are the train prompts by benchmark, read only by the source `prompts`."""
    store = open_store(config.store)
    used = dict(prompts) if config.calibration.reads(PROMPTS) else {}
    return stage(
        calibration,
        config.store,
        calibration.key_fields(config),
        {"dense": dense} | used,
        lambda out, progress: calibration.load_calibration(
            store.open(dense),
            [store.open(ref) for ref in used.values()],
            calibration=config.calibration,
            downloads=config.store.downloads,
            seed=config.seed,
            out=out,
        ),
    )
