"""Import torch and transformers without searching their 650,000 objects for garbage, now and later."""

import gc

_collecting = gc.isenabled()
gc.disable()

import transformers  # noqa: E402, F401

gc.freeze()
if _collecting:
    gc.enable()
