"""Keep the artifact store small: remove what no kept report used, and leftovers and claims of dead runs."""

from typing import Annotated

from prefect import flow
from pydantic import Field

from tailored_llama.config import StoreRoot
from tasks.housekeeping import collect_garbage


@flow(persist_result=False)
def housekeeping(
    store: StoreRoot,
    older_than_days: Annotated[float, Field(ge=1)] = 30,
    keep_under_gb: Annotated[float | None, Field(gt=0)] = None,
    keep_reports: Annotated[int | None, Field(ge=0)] = None,
) -> None:
    """Remove artifacts as `tailored-llama store gc --delete` does.

    Args:
        store: folder of the artifact store, or its fsspec URL, without password or token
        older_than_days: days since an artifact's last use before it may go; runs under way need one
        keep_under_gb: the oldest go until the store is this small (GB); absent: all that may go
        keep_reports: how many of the newest reports stay, with all they used; absent: every one
    """
    collect_garbage(store, older_than_days, keep_under_gb, keep_reports)
