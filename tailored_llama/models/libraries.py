"""Import torch and transformers first, and in two thirds of the CPU time.

First, because transformers' import registers the modelling file's classes, so that file must come later. Together the
two libraries make some 650,000 objects (`gc.get_freeze_count()`), none of them garbage. Python's collector would search
them again and again while they load, and once more when the process ends.
"""

import gc

_collecting = gc.isenabled()
gc.disable()

import transformers  # noqa: E402, F401

gc.freeze()
if _collecting:
    gc.enable()
