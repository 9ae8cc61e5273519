"""How fast llama.cpp reads and writes with a model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tailored_llama.config import Work
from tailored_llama.serving.export import gguf_file
from tailored_llama.serving.llama_cpp import load_llama_cpp

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 32, 3


def measure_speed(gguf: Path, *, settings: None, work: Work) -> None:
    """Stage: time llama.cpp with a GGUF file; write `speed.json` with seconds for a token.

    `reading` is that of a prompt of 256 tokens, `writing` of 32 tokens after it, one by one: medians of three passes
    after a first one, on as many threads as torch has (`OMP_NUM_THREADS`). What the tokens are makes no difference.

    Raises:
        InputError: llama.cpp's library is not installed.
    """
    ffi, library = load_llama_cpp("timing")
    from llama_cpp_py_sync import Llama

    model = Llama(str(gguf_file(gguf)), n_ctx=PROMPT_TOKENS)
    parameters = library.llama_context_default_params()  # Llama's own context computes logits at every position
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = PROMPT_TOKENS + NEW_TOKENS, PROMPT_TOKENS, PROMPT_TOKENS
    parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
    context = ffi.NULL
    try:
        if (context := library.llama_init_from_model(model._model, parameters)) == ffi.NULL:
            raise RuntimeError("llama.cpp could not make a context")
        passes = [_pass(context) for _ in range(1 + REPEATS)][1:]
    finally:
        library.llama_free(context)  # which takes NULL, too
        model.close()
    seconds = {name: median(one[name] for one in passes) for name in ("reading", "writing")}
    (work.out / "speed.json").write_text(json.dumps(seconds, indent=1) + "\n")


def read_speed(folder: Path) -> dict[str, float]:
    """What `measure_speed` wrote."""
    return dict(json.loads((folder / "speed.json").read_text()))


def _pass(context: Any) -> dict[str, float]:
    """Seconds for a token of a prompt, and for one that is written after it."""
    ffi, library = load_llama_cpp("timing")
    library.llama_memory_clear(library.llama_get_memory(context), True)

    def decode(count: int) -> float:
        tokens, start = ffi.new("llama_token[]", [7] * count), time.perf_counter()
        if library.llama_decode(context, library.llama_batch_get_one(tokens, count)):
            raise RuntimeError("llama.cpp could not compute a batch")
        library.llama_synchronize(context)
        return time.perf_counter() - start

    return {
        "reading": decode(PROMPT_TOKENS) / PROMPT_TOKENS,
        "writing": sum(decode(1) for _ in range(NEW_TOKENS)) / NEW_TOKENS,
    }
