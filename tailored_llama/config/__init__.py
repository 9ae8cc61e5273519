"""The configuration of a run, a sweep or a search: its fields, how it is read, and what follows from it."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
