"""A client of any server that speaks OpenAI's protocol: llama-server, vLLM, Ollama."""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from tailored_llama.errors import InputError, UnreachableError

TIMEOUT = 600  # seconds for one answer

Reply = tuple[str, str]  # a text, and why it ended: stop or length


class Refused(InputError):
    """Raised when a server refuses a request; `kind` is its own word for the reason, such as llama.cpp's."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class ChatServer:
    """A server by its URL, with or without `/v1`, and the name of its model, if it has several."""

    url: str
    model: str | None = None

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a request, which is a GET without a body; a path begins below `/v1`, or at the root with `/`.

        Raises:
            UnreachableError: no server answers.
            Refused: the server refuses the request, in its words.
            InputError: it answers something else than JSON.
        """
        root = self.url.rstrip("/").removesuffix("/v1")
        address = root + path if path.startswith("/") else f"{root}/v1/{path}"
        named = body if body is None or not self.model else {"model": self.model, **body}
        content = None if named is None else json.dumps(named).encode()
        try:
            request = urllib.request.Request(address, content, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            message, kind = _reason(error)
            raise Refused(f"{address}: the server says {message!r}; allowed: what it takes", kind) from None
        except OSError as error:
            reason = getattr(error, "reason", None) or error
            raise UnreachableError(f"{address}: {reason}; allowed: a server that runs, as from llama-server") from None
        except ValueError:
            allowed = "the URL of a server that speaks OpenAI's protocol, such as http://127.0.0.1:8080/v1"
            raise InputError(f"{self.url}: got no JSON from it; allowed: {allowed}") from None

    def chat(self, body: dict[str, Any]) -> Reply:
        """What a model writes in a chat, greedily."""
        answer = self.ask("chat/completions", {"temperature": 0, **body})["choices"][0]
        return str(answer["message"]["content"] or ""), str(answer["finish_reason"])

    def complete(self, body: dict[str, Any]) -> Reply:
        """The same for a prompt as it is."""
        answer = self.ask("completions", {"temperature": 0, **body})["choices"][0]
        return str(answer["text"]), str(answer["finish_reason"])

    def properties(self) -> dict[str, Any]:
        """What llama.cpp's server tells of itself, such as `model_path` and `chat_template`; others tell nothing."""
        try:
            return self.ask("/props")
        except UnreachableError:
            raise
        except InputError:
            return {}


def _reason(error: urllib.error.HTTPError) -> tuple[str, str]:
    """A server's message and its kind; without one, the status."""
    try:
        content = json.load(error)
        told = content.get("error", content)
        return str(told["message"])[:200], str(told.get("type"))
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{error.code} {error.reason}", ""
