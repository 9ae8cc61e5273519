"""Import transformers before the modelling file, whose classes it registers, and in two thirds of the CPU time.

Python's collector would search the 650,000 objects of torch and transformers again and again, and none is garbage.
"""

import gc

_collecting = gc.isenabled()
gc.disable()

import transformers  # noqa: E402, F401

gc.freeze()
if _collecting:
    gc.enable()
