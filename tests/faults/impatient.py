"""Run the flow with claims that expire within seconds: python -m tests.faults.impatient run.toml."""

import functools
import runpy
import sys

from tailored_llama import store
from tailored_llama.store.claims import Lease

store.ArtifactStore = functools.partial(store.ArtifactStore, lease=Lease(0.5, 5.0, 0.2))  # type: ignore[misc, assignment]
sys.argv = ["flows", "tailor", sys.argv[1]]
runpy.run_module("flows", run_name="__main__", alter_sys=True)
