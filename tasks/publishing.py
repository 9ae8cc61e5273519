"""Publishing the answer of a search: a task of its own, as what a server refuses now it may take in a minute."""

from functools import partial

from prefect import task

from tailored_llama.config import SmallestConfig
from tailored_llama.pipeline import publish_answer
from tailored_llama.store import ArtifactRef
from tasks.runner import RETRY_AFTER, is_retryable


@task(
    retries=len(RETRY_AFTER),
    retry_delay_seconds=list(RETRY_AFTER),
    retry_condition_fn=partial(is_retryable, False),
    persist_result=False,
)
def publish(config: SmallestConfig, report: ArtifactRef) -> None:
    """Publish the proven model of a search to `store.publish`, if it is better than the one there."""
    publish_answer(config, report)
