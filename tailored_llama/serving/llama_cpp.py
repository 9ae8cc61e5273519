"""K-quants, made by llama.cpp itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tailored_llama.errors import InputError


def requantise(source: Path, gguf_type: str, out: Path) -> None:
    """Write an F16 or F32 file anew with a K-quant, by llama.cpp's own `llama_model_quantize`.

    A matrix whose rows are no multiple of 256 gets another type of about as many bits, as llama.cpp decides.

    Raises:
        InputError: llama.cpp's library is not installed, or it fails.
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


def load_llama_cpp(purpose: str) -> tuple[Any, Any]:
    """The foreign-function interface and the library of llama.cpp; `purpose` is what needs them.

    Raises:
        InputError: it is not installed.
    """
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    except ImportError:
        allowed = "the types that need nothing, or after pip install 'tailored-llama[gguf]'"
        raise InputError(f"{purpose}: needs llama-cpp-py-sync, which is not installed; allowed: {allowed}") from None
    return get_ffi(), get_lib()
