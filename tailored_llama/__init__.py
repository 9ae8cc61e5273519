"""Tailored-LLaMA: prune a LLaMA-family model structurally, tailor it to one benchmark, measure what is left."""

import os

from lazy_loader import attach_stub

# OpenMP's threads spin while they wait. Beside another process that makes torch several times slower. But if they sleep
# at once, tuning takes longer by up to a half. So GNU's runtime, which torch has on Linux, spins for microseconds, and
# others do not spin. This has an effect before torch is loaded, and a policy of the user's own stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
