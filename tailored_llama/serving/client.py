"""A client of any server that speaks OpenAI's protocol: llama-server, vLLM, Ollama."""

import json
import math
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tailored_llama.errors import InputError, UnreachableError
from tailored_llama.progress import Progress, silent

TIMEOUT = 600  # seconds for one answer
LOOPBACK = ("127.0.0.1", "::1", "localhost")
TOO_LONG = ("exceeds the available context size", "maximum context length")  # what llama.cpp says, and vLLM
OPENAI = "the URL of a server that speaks OpenAI's protocol, such as http://127.0.0.1:8080/v1"


class Reply(NamedTuple):
    """A text, why it ended (stop, length or too long), and the probability of its tokens, if it was asked for."""

    text: str
    ended: str
    probability: float | None = None


class Refused(InputError):
    """Raised when a server refuses a request."""


@dataclass(frozen=True)
class ChatServer:
    """A server by its URL, with or without `/v1`, the name of its model, if it has several, and a key that it asks."""

    url: str
    model: str | None = None
    key: str = field(default="", repr=False)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a request, which is a GET without a body; a path begins below `/v1`, or at the root with `/`.

        Raises:
            UnreachableError: no server answers.
            Refused: the server refuses the request, in its words.
            InputError: it answers something else than an object in JSON.
        """
        root = self.url.rstrip("/").removesuffix("/v1")
        address = root + path if path.startswith("/") else f"{root}/v1/{path}"
        named = body if body is None or not self.model else {"model": self.model, **body}
        content = None if named is None else json.dumps(named).encode()
        try:
            request = urllib.request.Request(address, content, {"Content-Type": "application/json"})
            if self.key:
                request.add_unredirected_header("Authorization", f"Bearer {self.key}")
            # No proxy leads to this machine.
            proxies = [urllib.request.ProxyHandler({})] if urlsplit(address).hostname in LOOPBACK else []
            with urllib.request.build_opener(*proxies).open(request, timeout=TIMEOUT) as answer:
                if isinstance(told := json.load(answer), dict):
                    return told
        except urllib.error.HTTPError as error:
            message = _reason(error)
            message = (message.replace(self.key, "***") if self.key else message)[:200]  # it may repeat the key
            raise Refused(f"{address}: the server says {message!r}; allowed: a request that it takes") from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise UnreachableError(f"{address}: {reason}; allowed: a server that runs, as from llama-server") from None
        except ValueError:
            pass
        raise InputError(f"{address}: got something else than an object in JSON; allowed: {OPENAI}")

    def reply(self, body: dict[str, Any]) -> Reply:
        """What a model writes greedily after the `messages` of a request, or after its `prompt` as it is."""
        is_chat = "messages" in body
        answer = self.ask("chat/completions" if is_chat else "completions", {"temperature": 0, **body})
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] if is_chat else choice["text"]
            reply = Reply(str(text or ""), str(choice["finish_reason"]))
            if not body.get("logprobs"):
                return reply
            tokens = [token for token in choice["logprobs"]["content"] if token["bytes"]]  # the end has none
            return reply._replace(probability=math.exp(math.fsum(token["logprob"] for token in tokens)))
        except (LookupError, TypeError):
            raise InputError(f"{self.url}: got an answer without a choice; allowed: {OPENAI}") from None

    def named(self) -> "ChatServer":
        """The server with the name of the only model that it has, if none is named yet.

        Raises:
            InputError: it has no model of that name, or several to choose from; and as `ask`.
        """
        try:
            names = [str(model["id"]) for model in self.ask("models")["data"]]
        except (LookupError, TypeError):
            raise InputError(f"{self.url}: got no list of models; allowed: {OPENAI}") from None
        if self.model is None and len(names) == 1:
            return replace(self, model=names[0])
        if self.model not in names:
            got = "several models" if self.model is None and names else f"no model {self.model or 'at all'}"
            raise InputError(f"{self.url}: got {got}; allowed: a model that it has ({', '.join(names) or 'none'})")
        return self

    def properties(self) -> dict[str, Any]:
        """What llama.cpp's server tells of itself, such as `model_path` and `chat_template`; others tell nothing."""
        try:
            return self.ask("/props")
        except UnreachableError:
            raise
        except InputError:
            return {}


def ask_all(server: ChatServer, requests: Sequence[dict[str, Any]], progress: Progress = silent) -> list[Reply]:
    """What a server answers to requests; to one that is longer than its context, nothing."""
    replies: list[Reply] = []
    for done, request in enumerate(requests, 1):
        try:
            replies.append(server.reply(request))
        except Refused as error:
            if not any(told in str(error) for told in TOO_LONG):
                raise
            replies.append(Reply("", "too long"))
        progress(done, len(requests))
    return replies


def _reason(error: urllib.error.HTTPError) -> str:
    """A server's message; without one, the status."""
    try:
        content = json.load(error)
        return str(content.get("error", content)["message"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{error.code} {error.reason}"
