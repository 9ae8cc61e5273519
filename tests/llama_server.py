"""llama.cpp's own server on a GGUF file: what a client of it gets."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tailored_llama.serving import ChatServer, server


class LlamaServer(ChatServer):
    def chat_ids(self, *messages: dict[str, Any]) -> list[int]:
        """The token ids that a chat becomes."""
        prompt = self.ask("/apply-template", {"messages": messages})["prompt"]
        read = {"content": prompt, "add_special": True, "parse_special": True}
        return list(self.ask("/tokenize", read)["tokens"])

    def chat(self, body: dict[str, Any]) -> str:
        return self.reply(body)[0]


@contextmanager
def llama_server(file: Path, context: int = 256) -> Iterator[LlamaServer]:
    """A server with one thread: several spin where they wait, and starve what else runs."""
    with server.llama_server(file, context, 1) as (url, _):
        yield LlamaServer(url)
