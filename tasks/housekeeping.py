"""Housekeeping of the artifact store."""

from prefect import State, get_run_logger, task
from prefect.states import Completed

from tailored_llama import store


@task(name="collect garbage", retries=3, retry_delay_seconds=[10, 60, 300])
def collect_garbage(
    root: str, older_than_days: float, keep_under_gb: float | None, keep_reports: int | None
) -> State[None]:
    """Remove what no kept report used, and leftovers and claims of dead runs."""
    artifacts, log = store.ArtifactStore(root), get_run_logger()
    keep_under = None if keep_under_gb is None else int(keep_under_gb * 1e9)
    freed = sum(size for name, size in store.leftovers(artifacts) if store.remove_leftover(artifacts, name))
    unused = store.removable(store.survey(artifacts), older_than_days * 86400, keep_under, keep_reports)
    gone = store.remove_artifacts(artifacts, unused)
    for entry in unused:
        what = "removed" if entry in gone else "kept, as it is in use:"
        log.info("%s %s/%s, %.1f MB", what, entry.stage, entry.key[:12], entry.size / 1e6)
    freed += sum(entry.size for entry in gone)
    left = sum(entry.size for entry in store.survey(artifacts))
    return Completed(message=f"freed {freed / 1e9:.2f} GB; {left / 1e9:.2f} GB are left")
