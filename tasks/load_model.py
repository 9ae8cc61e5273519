"""Stage: the dense model as a safetensors checkpoint."""

from prefect.states import State

from tailored_llama import models
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import ModelConfig, StoreConfig
from tasks._stage import stage, task

VERSION = 1


@task("load {model.source}")
def load_model(store: StoreConfig, model: ModelConfig) -> State[ArtifactRef]:
    identity = models.model_identity(model)
    return stage(
        store,
        "dense",
        VERSION,
        {"identity": identity, "dtype": model.dtype},
        {},
        lambda out: models.load_model(model, identity, store.downloads, out),
    )
