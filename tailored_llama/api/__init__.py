"""The calls for a notebook: prune, tune, compare, smallest; without a configuration file, a store or Prefect."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
