"""Stage: a checkpoint's perplexity on a text."""

from prefect.states import State

from tailored_llama import perplexity, texts
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig
from tasks._progress import stage_progress
from tasks._stage import OnDevice, execution_of, open_store, stage, task

VERSION = 2


@task("perplexity {label}", frugal=True)
def measure_perplexity(config: RunConfig, label: str, checkpoint: ArtifactRef) -> State[ArtifactRef]:
    store, text = open_store(config.store), config.perplexity
    with stage_progress(f"perplexity {label}") as progress:
        return stage(
            config.store,
            "perplexity",
            VERSION,
            {
                "text": texts.text_identity(text),
                "window": text.window,
                "stride": text.stride or text.window,
                "tokens": text.tokens,
            },
            {"checkpoint": checkpoint},
            lambda out: perplexity.measure_perplexity(
                store.open(checkpoint), text, config.store.downloads, out, execution_of(config), progress
            ),
            OnDevice(config, "perplexity", {"model": label}),
        )
