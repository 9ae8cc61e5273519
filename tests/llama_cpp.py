"""llama.cpp itself, through its C interface: token ids, logits and greedy continuations of a GGUF file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from llama_cpp_py_sync import Llama
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib


class LlamaCpp:
    def __init__(self, model: Llama) -> None:
        self.model = model
        self.ffi, self.lib = get_ffi(), get_lib()

    def tokens(self, text: str) -> list[int]:
        return list(self.model.tokenize(text, add_special=True, parse_special=False))

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits at every position, float32 [tokens, vocabulary]."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.model._ctx), True)
        return self.extend(ids, 0)

    def extend(self, ids: Sequence[int], first: int, wanted: Sequence[bool] = ()) -> torch.Tensor:
        """Logits after further tokens, with the `first` tokens before them in the cache; of all, or of the wanted."""
        wanted = wanted or [True] * len(ids)
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, first + i, 1, wanted[i]
            batch.seq_id[i][0] = 0
        assert self.lib.llama_decode(self.model._ctx, batch) == 0
        values = self.ffi.buffer(self.lib.llama_get_logits(self.model._ctx), sum(wanted) * self.model.n_vocab * 4)
        found = torch.frombuffer(bytearray(values), dtype=torch.float32).reshape(sum(wanted), -1)
        self.lib.llama_batch_free(batch)
        return found

    def forget(self, first: int) -> None:
        """Drop from the cache all tokens from position `first` on."""
        assert self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.model._ctx), 0, first, -1)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The likeliest next tokens, each computed after those before it in the cache."""
        logits, new = self.logits(ids), []
        for at in range(len(ids), len(ids) + count):
            new.append(int(logits[-1].argmax()))
            logits = self.extend(new[-1:], at)
        return new


class _GgmlGelu(torch.nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        table = torch.nn.functional.gelu(values.half().float(), approximate="tanh").half().float()
        return table.where(values.abs() < 10, values.relu())


def with_ggml_gelu(model: Any) -> Any:
    """A transformers model that computes GELU as ggml does on a CPU: between -10 and 10 by a table of float16."""
    for layer in model.model.layers:
        for module in layer.modules():
            if "gelu" in type(getattr(module, "act_fn", None)).__name__.lower():
                module.act_fn = _GgmlGelu()
    return model


@contextmanager
def llama_cpp(path: Path, context: int = 256) -> Iterator[LlamaCpp]:
    model: Any = Llama(str(path), n_ctx=8)
    library = get_lib()
    # Its own context has embeddings, with which LFM2 computes no logits. This one is exact. It has one thread: several
    # spin where they wait, and starve each other where tests run side by side.
    library.llama_free(model._ctx)
    parameters = library.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = context
    parameters.type_k = parameters.type_v = parameters.flash_attn_type = 0
    parameters.n_threads = parameters.n_threads_batch = 1
    model._ctx = library.llama_init_from_model(model._model, parameters)
    try:
        yield LlamaCpp(model)
    finally:
        model.close()
