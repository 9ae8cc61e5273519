"""Stage: token sequences that importance is measured on."""

from prefect import task
from prefect.states import State

from tailored_llama import calibration, texts
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig
from tasks._stage import open_store, stage

VERSION = 1


@task(task_run_name="load calibration {config.calibration.source}")
def load_calibration(config: RunConfig, dense: ArtifactRef) -> State[ArtifactRef]:
    source = config.calibration
    return stage(
        config.store,
        "calibration",
        VERSION,
        {
            "text": texts.text_identity(source),
            "samples": source.samples,
            "tokens": source.tokens,
            "seed": config.seed,
        },
        {"dense": dense},
        lambda out: calibration.load_calibration(
            open_store(config.store).open(dense), source, config.store.downloads, config.seed, out
        ),
    )
