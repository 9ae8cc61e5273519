"""llama.cpp's own server on a GGUF file, in a process of its own that ends with the one that started it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tailored_llama.errors import InputError

HOST = "127.0.0.1"
CONTEXT = 4096  # tokens of a prompt and its answer, if nobody says how many
ALL_STATED = 2**31 - 1  # a bit for each sampling option: penalties that a file states for itself have no effect
GRAMMAR, TEMPLATE = "grammar.gbnf", "chat_template.jinja"  # files beside that of the model


@contextmanager
def llama_server(file: Path, context: int, threads: int, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The URL of a server, and its process. The grammar and the chat template are those that stand beside its file.

    `context` is the number of tokens of the longest prompt with its answer; port 0 is a free one. The process is killed
    at the end, since one that is asked to end sometimes does not.

    Raises:
        InputError: llama.cpp cannot serve the file, in its own words; or its server is not installed.
    """
    from tailored_llama.config import check_installed  # late: the server's own process needs none of it

    check_installed("xllamacpp", f"serving: got {file}", "safetensors")
    command = [sys.executable, "-m", __name__, str(file), str(context), str(threads), str(port)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(command, **pipes, stderr=log, start_new_session=True) as process,  # no Ctrl-C reaches it
    ):
        assert process.stdout
        try:
            if not (url := process.stdout.readline().strip()):
                log.seek(0)
                told = log.read().strip().splitlines() or ["it ended without a word"]
                got = f"llama.cpp cannot serve it{f' on port {port}' * bool(port)} ({told[-1]})"
                raise InputError(f"{file}: {got}; allowed: a GGUF file that it can, on a port that is free")
            yield url, process
        finally:
            process.kill()


def _serve(path: str, context: str, threads: str, port: str) -> None:
    """Print the URL of a server, and serve until the process that started this one closes the input, or ends."""
    import xllamacpp  # late: it is a part of an extra

    file, params = Path(path), xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port = path, [HOST], int(port)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = int(context), 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.n_threads_http = 2
    params.sampling.user_sampling_config = ALL_STATED
    if (grammar := file.with_name(GRAMMAR)).is_file():
        kind = xllamacpp.common_grammar_type.COMMON_GRAMMAR_TYPE_USER
        params.sampling.grammar = xllamacpp.CommonGrammar(kind, grammar.read_text(encoding="utf-8"))
    if (template := file.with_name(TEMPLATE)).is_file():
        params.chat_template = template.read_text(encoding="utf-8")
    server = xllamacpp.Server(params)  # which ends with this object
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # the server's own end may wait for ever


if __name__ == "__main__":
    _serve(*sys.argv[1:])
