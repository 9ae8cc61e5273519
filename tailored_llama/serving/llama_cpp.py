"""llama.cpp itself: it makes K-quants, and is timed."""

import json
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from tailored_llama.config import Work
from tailored_llama.errors import InputError
from tailored_llama.serving.gguf_writing import gguf_file

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 32, 3


def load_llama_cpp(purpose: str) -> tuple[Any, Any]:
    """llama.cpp's foreign-function interface and library; an `InputError` says that `purpose` needs them."""
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    except ImportError:
        allowed = "the types that need nothing, or after pip install 'tailored-llama[gguf]'"
        raise InputError(f"{purpose}: needs llama-cpp-py-sync, which is not installed; allowed: {allowed}") from None
    return get_ffi(), get_lib()


def requantise(source: Path, gguf_type: str, out: Path) -> None:
    """Write an F16 or F32 file anew with a K-quant, by llama.cpp's own `llama_model_quantize`.

    It gives a matrix whose rows are no multiple of 256 another type of about as many bits.
    """
    ffi, library = load_llama_cpp(f"type {gguf_type}")
    quiet = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None)
    library.llama_log_set(quiet, ffi.NULL)  # it prints a line for every tensor
    parameters = ffi.new("llama_model_quantize_params *", library.llama_model_quantize_default_params())
    parameters.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{gguf_type.upper()}")
    try:
        if library.llama_model_quantize(str(source).encode(), str(out).encode(), parameters):
            raise InputError(f"{source}: llama.cpp could not write it as {gguf_type}; allowed: a whole GGUF file, room")
    finally:
        library.llama_log_set(ffi.NULL, ffi.NULL)


def measure_speed(gguf: Path, *, settings: None, work: Work) -> None:
    """Stage: time llama.cpp with a GGUF file; write `speed.json` with seconds for a token.

    `reading` is that of a prompt of 256 tokens, `writing` of 32 tokens after it, one by one: medians of three passes
    after a first one, on as many threads as torch has (`OMP_NUM_THREADS`). What the tokens are makes no difference.
    """
    ffi, library = load_llama_cpp("timing")
    from llama_cpp_py_sync import Llama

    model = Llama(str(gguf_file(gguf)), n_ctx=PROMPT_TOKENS)
    parameters = library.llama_context_default_params()  # Llama's own context computes logits at every position
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = PROMPT_TOKENS + NEW_TOKENS, PROMPT_TOKENS, PROMPT_TOKENS
    parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
    context = ffi.NULL

    def decode(count: int) -> float:
        """Seconds for a token of so many that are read at once."""
        tokens, start = ffi.new("llama_token[]", [7] * count), time.perf_counter()
        if library.llama_decode(context, library.llama_batch_get_one(tokens, count)):
            raise RuntimeError("llama.cpp could not compute a batch")
        library.llama_synchronize(context)
        return (time.perf_counter() - start) / count

    reading, writing = [], []
    try:
        if (context := library.llama_init_from_model(model._model, parameters)) == ffi.NULL:
            raise RuntimeError("llama.cpp could not make a context")
        for _ in range(1 + REPEATS):
            library.llama_memory_clear(library.llama_get_memory(context), True)
            reading.append(decode(PROMPT_TOKENS))
            writing.append(fmean(decode(1) for _ in range(NEW_TOKENS)))
    finally:
        library.llama_free(context)  # which takes NULL, too
        model.close()
    seconds = {"reading": median(reading[1:]), "writing": median(writing[1:])}
    (work.out / "speed.json").write_text(json.dumps(seconds, indent=1) + "\n")


def read_speed(folder: Path) -> dict[str, float]:
    """Read what `measure_speed` wrote."""
    return dict(json.loads((folder / "speed.json").read_text()))
