"""From numbers to pages: reports, model cards and the tables of a terminal."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
