"""The way out: checkpoints and adapters for the runtimes that people serve with."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
