"""From rows to tokens: benchmarks, template sets, prompts, texts and calibration sequences."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
