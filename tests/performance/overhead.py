"""What the pipeline costs beside the stages it runs: time of the flow less time in the library, and a rerun.

python tests/performance/overhead.py data/quickstart.toml [--set key=value …]

PREFECT_API_URL names a running server (`prefect server start`); the store is a new temporary folder. The seconds of the
stages are those in their manifests, of the very same run, so that a busy machine slows both alike. What is left is
Prefect, hashing and publishing. The rerun is a process of its own, in which every stage is found: what its flow run
took, and with it the start of Python and all imports.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort
from rich.console import Console
from rich.table import Table


def run(config: str, overrides: list[str], store: str) -> tuple[float, float]:
    """Run the flow in a process of its own; seconds of the process, and of the flow run."""
    command = [sys.executable, "-m", "flows", "tailor", config, "--set", f"store.root={store}"]
    begun = time.perf_counter()
    subprocess.run(command + [f"--set={override}" for override in overrides], check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - begun
    with get_client(sync_client=True) as client:
        ended = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.COMPLETED])))
        (last,) = client.read_flow_runs(flow_run_filter=ended, limit=1, sort=FlowRunSort.END_TIME_DESC)
    return whole, last.total_run_time.total_seconds()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    if "PREFECT_API_URL" not in os.environ:
        print("PREFECT_API_URL: not set; allowed: the API of a running server, such as http://127.0.0.1:4200/api")
        return 2
    with tempfile.TemporaryDirectory() as store:
        whole, flow = run(options.config, options.overrides, store)
        manifests = [json.loads(path.read_text()) for path in Path(store).glob("*/*/manifest.json")]
        stages = sum(manifest["seconds"] for manifest in manifests)
        again, again_flow = run(options.config, options.overrides, store)
    table = Table("what", "seconds")
    table.add_row(f"{len(manifests)} stages, in the library", f"{stages:.1f}")
    table.add_row("flow run", f"{flow:.1f}")
    table.add_row("flow ÷ stages", f"{flow / stages:.3f}")
    table.add_row("process", f"{whole:.1f}")
    table.add_row("rerun, all found: flow run", f"{again_flow:.1f}")
    table.add_row("rerun, all found: process", f"{again:.1f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
