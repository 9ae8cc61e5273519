"""Stage: token sequences that importance is measured on and reconstruction fitted to."""

from collections.abc import Mapping

from prefect.states import State

from tailored_llama import calibration, texts
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig
from tasks._stage import open_store, stage, task

VERSION = 2


@task("load calibration {config.calibration.source}")
def load_calibration(config: RunConfig, dense: ArtifactRef, prompts: Mapping[str, ArtifactRef]) -> State[ArtifactRef]:
    """`prompts` are the train prompts by benchmark; the source `prompts` alone reads them."""
    artifacts, text = open_store(config.store), config.calibration
    used = dict(prompts) if text.source == texts.PROMPTS else {}
    return stage(
        config.store,
        "calibration",
        VERSION,
        {"text": texts.text_identity(text), "samples": text.samples, "tokens": text.tokens, "seed": config.seed},
        {"dense": dense} | used,
        lambda out: calibration.load_calibration(
            artifacts.open(dense),
            text,
            config.store.downloads,
            config.seed,
            out,
            [artifacts.open(p) for p in used.values()],
        ),
    )
