"""A client of any server that speaks OpenAI's protocol, such as llama-server and vLLM."""

import json
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from tailored_llama.errors import InputError, UnreachableError
from tailored_llama.progress import Progress, silent

_log = logging.getLogger(__name__)

TIMEOUT = 600  # seconds for one answer, and until a busy server may be asked again
TRIES = 6  # within about half a minute, if the server does not say when
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
    """A server by its URL, with or without `/v1`, the name of its model, if it has several, and a key that it asks.

    `kept` is a file that gets each answer as it comes. `ask_all` does not ask again what stands there.

    Raises:
        InputError: the URL is none of a server, or it would send a key over http to another machine.
    """

    url: str
    model: str | None = None
    key: str = field(default="", repr=False)
    kept: Path | None = None

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query:
            raise InputError(f"url: got {self.url!r}; allowed: {OPENAI}")
        if self.key and url.scheme == "http" and not _is_here(url.host):
            allowed = "https, or http to this machine, as others could read the key"
            raise InputError(f"url: got {self.url!r} with a key; allowed: {allowed}")

    @cached_property
    def _client(self) -> httpx.Client:
        """It follows no redirect, which could lead a key elsewhere. llama.cpp's few threads wait for open connections.

        No proxy leads to this machine.
        """
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        limits, is_here = httpx.Limits(max_keepalive_connections=0), _is_here(httpx.URL(self.url).host)
        return httpx.Client(headers=headers, timeout=TIMEOUT, limits=limits, trust_env=not is_here)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a request, which is a GET without a body; a path begins below `/v1`, or at the root with `/`.

        It is asked again where the connection fails, or the server answers with 408, 429 or 5xx.

        Raises:
            UnreachableError: no server answers, or it cannot at the moment.
            Refused: the server refuses the request, in its words.
            InputError: it answers something else than an object in JSON.
        """
        root = self.url.rstrip("/").removesuffix("/v1")
        address = root + path if path.startswith("/") else f"{root}/v1/{path}"
        named = body if body is None or not self.model else {"model": self.model, **body}
        content = None if named is None else json.dumps(named)
        retrying = Retrying(retry=retry_if_exception(_is_passing), wait=_wait, stop=_is_last, reraise=True)
        try:
            answer = retrying(self._send, "GET" if content is None else "POST", address, content)
            if isinstance(told := answer.json(), dict):
                return told
        except httpx.HTTPStatusError as error:
            message = _reason(error.response)
            message = (message.replace(self.key, "***") if self.key else message)[:200]  # it may repeat the key
            if not _is_passing(error):
                raise Refused(f"{address}: the server says {message!r}; allowed: a request that it takes") from None
            told = f"{error.response.status_code}, {message!r} (tries: {retrying.statistics['attempt_number']})"
            raise UnreachableError(f"{address}: the server says {told}; allowed: one that is ready") from None
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise UnreachableError(f"{address}: {reason}; allowed: a server that runs, as from llama-server") from None
        except ValueError:
            pass
        raise InputError(f"{address}: got something else than an object in JSON; allowed: {OPENAI}")

    def _send(self, method: str, address: str, content: str | None) -> httpx.Response:
        return self._client.request(method, address, content=content).raise_for_status()

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
    """What a server answers to requests, or has answered in its file; to one longer than its context, nothing."""
    replies: list[Reply] = []
    asked = [json.dumps([server.url, server.model, request], sort_keys=True) for request in requests]
    digests = [sha256(one.encode()).hexdigest() for one in asked]
    kept = _read_kept(server.kept) if server.kept else {}
    if found := len(kept.keys() & {*digests}):
        _log.warning("%s: %d answers of a run that was cut off are in %s", server.url, found, server.kept)
    for done, (digest, request) in enumerate(zip(digests, requests, strict=True), 1):
        if not (reply := kept.get(digest)):
            try:
                reply = server.reply(request)
            except Refused as error:
                if not any(told in str(error) for told in TOO_LONG):
                    raise
                reply = Reply("", "too long")
            if server.kept:
                _keep(server.kept, {"request": digest, "reply": reply})
        replies.append(reply)
        progress(done, len(requests))
    return replies


def _read_kept(file: Path) -> dict[str, Reply]:
    """The answers in a file by their requests, without a line that was cut off."""
    kept: dict[str, Reply] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with suppress(ValueError):
            told = json.loads(line)
            kept[told["request"]] = Reply(*told["reply"])
    return kept


def _keep(file: Path, answer: dict[str, Any]) -> None:
    """Add a line to a file; it begins with a line break, which ends one that was cut off."""
    with suppress(OSError):  # nowhere to write: the run can still end well
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write("\n" + json.dumps(answer))


def _is_here(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _is_passing(error: BaseException) -> bool:
    """Whether the same request may soon succeed. One that took all its time would take it again."""
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        return status in (408, 429) or (status >= 500 and status != 501)  # 501: it is not implemented
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.ReadTimeout)


def _wait(state: RetryCallState) -> float:
    """Seconds until the next try: what the server says (`Retry-After`, a number or a date), or ever more."""
    error = state.outcome and state.outcome.exception()
    told = error.response.headers.get("Retry-After", "") if isinstance(error, httpx.HTTPStatusError) else ""
    try:
        at = None if told.isdecimal() else parsedate_to_datetime(told)
        return max(0.0, (at - datetime.now(UTC)).total_seconds()) if at else float(told)
    except (ValueError, TypeError):
        return wait_exponential(0.5)(state)


def _is_last(state: RetryCallState) -> bool:
    return stop_after_attempt(TRIES)(state) or state.upcoming_sleep > TIMEOUT


def _reason(answer: httpx.Response) -> str:
    """A server's message; without one, the status."""
    try:
        content = answer.json()
        return str(content.get("error", content)["message"])
    except (ValueError, TypeError, KeyError, AttributeError):
        to = f" to {answer.headers['Location']}" if "Location" in answer.headers else ""
        return f"{answer.status_code} {answer.reason_phrase}{to}"
