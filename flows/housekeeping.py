"""Keep the artifact store small: remove what no kept report used, and leftovers and claims of dead runs."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from tasks.housekeeping import collect_garbage

Store = Annotated[str, Field(min_length=1, description="Folder, or fsspec URL, of the artifact store.")]
Days = Annotated[
    float, Field(ge=1, description="Days since an artifact's last use before it may go; runs under way need one.")
]
Gigabytes = Annotated[
    float | None, Field(gt=0, description="The oldest go until the store is this small (GB); absent: all that may go.")
]
Reports = Annotated[
    int | None, Field(ge=0, description="How many of the newest reports stay, with all they used; absent: every one.")
]


@flow(persist_result=False)
def housekeeping(
    store: Store, older_than_days: Days = 30, keep_under_gb: Gigabytes = None, keep_reports: Reports = None
) -> None:
    """Remove artifacts as `tailored-llama store gc --delete` does."""
    collect_garbage(store, older_than_days, keep_under_gb, keep_reports)
