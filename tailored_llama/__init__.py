"""Tailored-LLaMA: prune a LLaMA-family model structurally, tailor it to one benchmark, measure what is left."""

import os

from lazy_loader import attach_stub

# OpenMP's threads spin while they wait. Beside another process that makes torch several times slower; waiting passively
# costs a tenth. This has an effect before torch is loaded, and a value of the user's own stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
