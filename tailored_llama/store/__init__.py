"""Bytes, kept and fetched: artifacts and their keys, tables, housekeeping, downloads, exports."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
