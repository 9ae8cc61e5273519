"""llama.cpp's own server on a GGUF file: what a client of it gets."""

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class LlamaServer:
    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return dict(json.load(answer))

    def chat_ids(self, *messages: dict[str, Any]) -> list[int]:
        """The token ids that a chat becomes."""
        prompt = self.ask("/apply-template", {"messages": messages})["prompt"]
        read = {"content": prompt, "add_special": True, "parse_special": True}
        return list(self.ask("/tokenize", read)["tokens"])

    def chat(self, body: dict[str, Any]) -> str:
        answer = self.ask("/v1/chat/completions", body)["choices"][0]
        return str(answer["message"]["content"])


@contextmanager
def llama_server(file: Path, context: int = 256) -> Iterator[LlamaServer]:
    """A server with the grammar beside the file, if there is one, as with --grammar-file.

    It is a process of its own, which is killed: one that is asked to end at once sometimes does not.
    """
    command = [sys.executable, __file__, str(file), str(context)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield LlamaServer(process.stdout.readline().strip())
        finally:
            process.kill()


def serve(file: Path, context: int) -> None:
    """Print the address of a server, and serve until killed."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port = str(file), 0
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, 0
    # Several threads spin where they wait, and starve what else runs.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_threads_http = 2
    if (grammar := file.with_name("grammar.gbnf")).is_file():
        kind = xllamacpp.common_grammar_type.COMMON_GRAMMAR_TYPE_USER
        params.sampling.grammar = xllamacpp.CommonGrammar(kind, grammar.read_text(encoding="utf-8"))
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
