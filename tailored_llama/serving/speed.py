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
    _, library = load_llama_cpp("timing")
    from llama_cpp_py_sync import Llama

    size: dict[str, Any] = {"n_ctx": PROMPT_TOKENS + NEW_TOKENS, "n_batch": PROMPT_TOKENS, "n_ubatch": PROMPT_TOKENS}
    model = Llama(str(gguf_file(gguf)), **size)
    library.llama_set_n_threads(model._ctx, threads := torch.get_num_threads(), threads)
    try:
        passes = [_pass(model) for _ in range(1 + REPEATS)][1:]
    finally:
        model.close()
    seconds = {name: median(one[name] for one in passes) for name in ("reading", "writing")}
    (work.out / "speed.json").write_text(json.dumps(seconds, indent=1) + "\n")


def read_speed(folder: Path) -> dict[str, float]:
    """What `measure_speed` wrote."""
    return dict(json.loads((folder / "speed.json").read_text()))


def _pass(model: Any) -> dict[str, float]:
    """Seconds for a token of a prompt, and for one that is written after it."""
    ffi, library = load_llama_cpp("timing")
    library.llama_memory_clear(library.llama_get_memory(model._ctx), True)

    def decode(count: int) -> float:
        tokens, start = ffi.new("llama_token[]", list(range(16, 16 + count))), time.perf_counter()
        if library.llama_decode(model._ctx, library.llama_batch_get_one(tokens, count)):
            raise RuntimeError("llama.cpp could not compute a batch")
        library.llama_synchronize(model._ctx)
        return time.perf_counter() - start

    return {
        "reading": decode(PROMPT_TOKENS) / PROMPT_TOKENS,
        "writing": sum(decode(1) for _ in range(NEW_TOKENS)) / NEW_TOKENS,
    }
