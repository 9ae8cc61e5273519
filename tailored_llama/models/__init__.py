"""Checkpoints, weights and forward passes: converting, loading, adapters, packed rows."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
