"""Run the flow with claims that expire within seconds: python -m tests.faults.impatient run.toml."""

from __future__ import annotations

import runpy
import sys

from tailored_llama.store import claims

claims.RENEW, claims.LEASE, claims.LOOK = 0.5, 5.0, 0.2
sys.argv = ["flows", "tailor", sys.argv[1]]
runpy.run_module("flows", run_name="__main__", alter_sys=True)
