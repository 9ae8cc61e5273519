"""The work pools of the Prefect server, and how much each runs at once. All else of a pool stays as it is."""

import os

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

COMPOSING = 4  # flows that the cpu pool runs at once: they mostly wait


def set_limit(client: SyncPrefectClient, name: str, limit: int) -> None:
    """Limit what a process pool runs at once; create the pool if there is none of this name."""
    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
    client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=limit))
    print(f"work pool: {name}, {limit} at once")


def main() -> None:
    limit = int(os.environ.get("TAILORED_LLAMA_GPUS", "1"))  # how many stages all machines run at once
    with get_client(sync_client=True) as client:
        set_limit(client, "cpu", COMPOSING)
        set_limit(client, "gpu", limit)
        # One stage a GPU; `device_slot` also keeps apart what another server sends.
        queue = client.read_work_queue_by_name("default", work_pool_name="gpu")
        client.update_work_queue(queue.id, concurrency_limit=limit)
