"""llama.cpp itself: it makes K-quants, scores choices, and is timed."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quant_shape_to_byte_shape
from scipy.special import logsumexp

from tailored_llama.config import Work
from tailored_llama.errors import InputError
from tailored_llama.models import Document, Encoded, side_by_side
from tailored_llama.progress import Progress
from tailored_llama.serving.gguf_writing import Array, gguf_file

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 32, 3


def load_llama_cpp(purpose: str) -> tuple[Any, Any]:
    """llama.cpp's foreign-function interface and library; an `InputError` says that `purpose` needs them."""
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    except ImportError:
        allowed = "after pip install 'tailored-llama[gguf]'"
        raise InputError(f"{purpose}: needs llama-cpp-py-sync, which is not installed; allowed: {allowed}") from None
    ffi, library = get_ffi(), get_lib()
    library.llama_log_set(_silent(ffi), ffi.NULL)  # it prints a line for every tensor
    return ffi, library


@cache
def _silent(ffi: Any) -> Any:
    """A callback that logs nothing, which lives as long as this process."""
    return ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None)


@cache
def _quantiser(ffi: Any, library: Any) -> Any:
    """ggml's function that quantises rows, which llama.cpp's header does not declare."""
    ffi.cdef(
        "size_t ggml_quantize_chunk(enum ggml_type type, const float * src, void * dst, int64_t start, int64_t nrows, "
        "int64_t n_per_row, const float * imatrix);",
        override=True,
    )
    return library.ggml_quantize_chunk


def quantise_rows(values: Array, kind: GGMLQuantizationType, importance: Array | None = None) -> Array:
    """The bytes of a matrix [rows, inputs] by ggml itself; with the importance of each input, if some matter more."""
    ffi, library = load_llama_cpp(f"type {kind.name.lower()}")
    values, (rows, inputs) = np.ascontiguousarray(values, np.float32), values.shape
    out = np.empty(quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    source, target = ffi.from_buffer("float[]", values), ffi.from_buffer(out)
    weights = ffi.NULL if importance is None else ffi.from_buffer("float[]", importance)

    def quantise(part: range) -> None:
        _quantiser(ffi, library)(int(kind), source, target, part.start * inputs, len(part), inputs, weights)

    share = max(1, math.ceil(rows / torch.get_num_threads()))
    side_by_side(quantise, [range(rows)[start : start + share] for start in range(0, rows, share)], 1)
    return out


def requantise(source: Path, gguf_type: str, out: Path, importance: Mapping[str, Array], uniform: bool = False) -> None:
    """Write an F16 or F32 file anew in a type, by llama.cpp's own `llama_model_quantize`.

    A K-quant is a mixture, if it is not to be `uniform`: then all matrices have the type, but embedding and head Q8_0.
    llama.cpp gives a matrix whose rows are no multiple of 256 another type of about as many bits. `importance` has that
    of the inputs of some tensors, by name.
    """
    ffi, library = load_llama_cpp(f"type {gguf_type}")
    parameters = ffi.new("llama_model_quantize_params *", library.llama_model_quantize_default_params())
    kind = f"LLAMA_FTYPE_MOSTLY_{gguf_type.upper()}"
    parameters.ftype = getattr(library, kind if hasattr(library, kind) else f"{kind}_S")
    if uniform:
        parameters.pure, wide = True, int(GGMLQuantizationType.Q8_0)
        parameters.token_embedding_type = parameters.output_tensor_type = wide
    names = [ffi.new("char[]", name.encode()) for name in importance]
    values = [ffi.from_buffer("float[]", np.ascontiguousarray(own, np.float32)) for own in importance.values()]
    entries = [(name, own, len(own)) for name, own in zip(names, values, strict=True)]
    listed = ffi.new("struct llama_model_imatrix_data[]", [*entries, (ffi.NULL, ffi.NULL, 0)])
    if importance:
        parameters.imatrix = listed
    if library.llama_model_quantize(str(source).encode(), str(out).encode(), parameters):
        raise InputError(f"{out}: llama.cpp could not write it as {gguf_type}; allowed: a model that it has, and room")


@contextmanager
def _context(file: Path, purpose: str, tokens: int, sequences: int = 1) -> Iterator[tuple[Any, Any, Any, Any]]:
    """The interface, the library, a model, and a context that reads so many tokens at once, on torch's threads.

    A token may belong to several sequences, but not in a model with states, which are of one.
    """
    ffi, library = load_llama_cpp(purpose)
    model = library.llama_model_load_from_file(str(file).encode(), library.llama_model_default_params())
    if model == ffi.NULL:
        raise InputError(f"{file}: llama.cpp cannot load it; allowed: a whole GGUF file of an architecture that it has")
    if library.llama_model_is_recurrent(model) or library.llama_model_is_hybrid(model):
        sequences = 1
    parameters = library.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = tokens
    parameters.n_seq_max, parameters.kv_unified = sequences, True
    parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
    context = library.llama_init_from_model(model, parameters)
    try:
        if context == ffi.NULL:
            raise RuntimeError("llama.cpp could not make a context")
        yield ffi, library, model, context
    finally:
        library.llama_free(context)  # which takes NULL, too
        library.llama_model_free(model)


def file_loglikelihoods(file: Path, encoded: Sequence[Encoded], progress: Progress) -> list[list[float]]:
    """Summed log-probability of every choice of every prompt, by llama.cpp; as `data.loglikelihoods`.

    A batch is a prompt with as many of its choices as llama.cpp takes sequences, which share the tokens before them. In
    models with states, it is a prompt with one choice.
    """
    _, library = load_llama_cpp("scoring")
    most = min(max(len(item.targets) for item in encoded), library.llama_max_parallel_sequences())
    longest, sums = max(len(part.document) for item in encoded for part in _parts(item, most)), []
    with _context(file, "scoring", longest, most) as (ffi, library, model, context):
        most = library.llama_n_seq_max(context)
        parts = [[*_parts(item, most)] for item in encoded]
        size = 4 * library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        batch = library.llama_batch_init(longest, 0, most)

        def logits(position: int) -> Array:
            row = ffi.buffer(library.llama_get_logits_ith(context, position), size)
            return np.frombuffer(row, np.float32)

        def scores(item: Encoded) -> Iterator[float]:
            scored = {position for positions in item.positions for position in positions}
            batch.n_tokens = 0
            _add(batch, item.document.prefix, 0, range(len(item.targets)), scored)
            for number, branch in enumerate(item.document.branches):
                _add(batch, branch, len(item.document.prefix), [number], scored)
            library.llama_memory_clear(library.llama_get_memory(context), True)
            if library.llama_decode(context, batch):
                raise RuntimeError("llama.cpp could not compute a batch")
            totals = {position: logsumexp(logits(position).astype(np.float64)) for position in scored}
            for choice in zip(item.positions, item.targets, strict=True):
                yield math.fsum(
                    float(logits(position)[token]) - totals[position] for position, token in zip(*choice, strict=True)
                )

        try:
            for done, item in enumerate(parts, 1):
                sums.append([score for part in item for score in scores(part)])
                progress(done, len(parts))
        finally:
            library.llama_batch_free(batch)
    return sums


def next_logits(file: Path, tokens: Sequence[int]) -> Array:
    """The logits [vocabulary] after some tokens, by llama.cpp."""
    with _context(file, "logits", len(tokens)) as (ffi, library, model, context):
        ids = ffi.new("llama_token[]", tokens)
        if library.llama_decode(context, library.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError("llama.cpp could not compute a batch")
        size = 4 * library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        return np.frombuffer(bytearray(ffi.buffer(library.llama_get_logits_ith(context, -1), size)), np.float32)


def _parts(item: Encoded, most: int) -> Iterator[Encoded]:
    """A prompt with all its choices as several with at most so many."""
    prefix, branches = item.document.prefix, item.document.branches
    for start in range(0, len(branches), most):
        part, left_out = slice(start, start + most), sum(map(len, branches[:start]))
        positions = [[p if p < len(prefix) else p - left_out for p in choice] for choice in item.positions[part]]
        yield Encoded(Document(prefix, branches[part]), positions, item.targets[part])


def _add(batch: Any, tokens: Sequence[int], start: int, sequences: Sequence[int], scored: Set[int]) -> None:
    """Add tokens to a batch, from a position on, that all these sequences share."""
    for position, token in enumerate(tokens, start):
        i = batch.n_tokens
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, len(sequences), i in scored
        for place, sequence in enumerate(sequences):
            batch.seq_id[i][place] = sequence
        batch.n_tokens += 1


def measure_speed(gguf: Path, *, settings: None, work: Work) -> None:
    """Stage: time llama.cpp with a GGUF file; write `speed.json` with seconds for a token.

    `reading` is that of a prompt of 256 tokens, `writing` of 32 tokens after it, one by one: medians of three passes
    after a first one, on as many threads as torch has (`OMP_NUM_THREADS`). What the tokens are makes no difference.
    """
    reading, writing = [], []
    with _context(gguf_file(gguf), "timing", PROMPT_TOKENS + NEW_TOKENS) as (ffi, library, _, context):

        def decode(count: int) -> float:
            """Seconds for a token of so many that are read at once."""
            tokens, start = ffi.new("llama_token[]", [7] * count), time.perf_counter()
            if library.llama_decode(context, library.llama_batch_get_one(tokens, count)):
                raise RuntimeError("llama.cpp could not compute a batch")
            library.llama_synchronize(context)
            return (time.perf_counter() - start) / count

        for _ in range(1 + REPEATS):
            library.llama_memory_clear(library.llama_get_memory(context), True)
            reading.append(decode(PROMPT_TOKENS))
            writing.append(fmean(decode(1) for _ in range(NEW_TOKENS)))
    seconds = {"reading": median(reading[1:]), "writing": median(writing[1:])}
    (work.out / "speed.json").write_text(json.dumps(seconds, indent=1) + "\n")


def read_speed(folder: Path) -> dict[str, float]:
    """Read what `measure_speed` wrote."""
    return dict(json.loads((folder / "speed.json").read_text()))
