"""Stage: load the dense model as a safetensors checkpoint."""

from prefect import State

from tailored_llama.config import ModelConfig, StoreConfig
from tailored_llama.models import convert
from tailored_llama.store import ArtifactRef
from tasks._stage import stage, task


@task("load {model.source}")
def load_model(store: StoreConfig, model: ModelConfig) -> State[ArtifactRef]:
    return stage(
        convert,
        store,
        convert.key_fields(model),
        {},
        lambda out, progress: convert.prepare_dense(model, downloads=store.downloads, out=out),
    )
