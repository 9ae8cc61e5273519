"""The stages composed: the whole pipeline, sweeps and searches, and the executors that make them in this process."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
