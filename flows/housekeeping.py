"""Keep the artifact store small: remove what no kept report used, and leftovers and claims of dead runs."""

from typing import Annotated

from prefect import State, flow, get_run_logger
from prefect.states import Completed
from pydantic import Field

from tailored_llama import store as stores
from tailored_llama.config import StoreRoot


@flow(persist_result=False, retries=3, retry_delay_seconds=60)
def housekeeping(
    store: StoreRoot,
    older_than_days: Annotated[float, Field(ge=1)] = 30,
    keep_under_gb: Annotated[float | None, Field(gt=0)] = None,
    keep_reports: Annotated[int | None, Field(ge=0)] = None,
) -> State[None]:
    """Remove artifacts as `tailored-llama store gc --delete` does.

    Args:
        store: folder of the artifact store, or its fsspec URL, without password or token
        older_than_days: days since an artifact's last use before it may go; runs under way need one
        keep_under_gb: the oldest go until the store is this small (GB); absent: all that may go
        keep_reports: how many of the newest reports stay, with all they used; absent: every one
    """
    artifacts, log = stores.ArtifactStore(store), get_run_logger()
    keep_under = None if keep_under_gb is None else int(keep_under_gb * 1e9)
    freed = sum(size for name, size in stores.leftovers(artifacts) if stores.remove_leftover(artifacts, name))
    unused = stores.removable(stores.survey(artifacts), older_than_days * 86400, keep_under, keep_reports)
    gone = stores.remove_artifacts(artifacts, unused)
    for entry in unused:
        what = "removed" if entry in gone else "kept, as it is in use:"
        log.info("%s %s/%s, %.1f MB", what, entry.stage, entry.key[:12], entry.size / 1e6)
    freed += sum(entry.size for entry in gone)
    left = sum(entry.size for entry in stores.survey(artifacts))
    return Completed(message=f"freed {freed / 1e9:.2f} GB; {left / 1e9:.2f} GB are left")
