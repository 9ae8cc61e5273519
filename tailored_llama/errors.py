"""Errors that a user can fix, and helpers for all other errors."""


class InputError(ValueError):
    """Raised when a value, file or model given by the user cannot be used.

    The message is one line that names the field or file, the value got, and what is allowed. It is shown alone.
    """


class UnreachableError(InputError):
    """Raised when a server does not answer, or cannot at the moment; the same request may succeed later."""


# By name, because not all are installed: Python's own, and those of requests, httpx, aiohttp and botocore.
_DROPPED = {"ConnectionError", "TimeoutError", "Timeout", "TransportError", "ClientConnectionError", "HTTPClientError"}


def is_transient(error: BaseException) -> bool:
    """Return whether a request may succeed later: it or its cause failed by the connection, or HTTP 408, 429, 5xx."""
    if isinstance(error, InputError):
        return isinstance(error, UnreachableError)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & _DROPPED or _status(error) in (408, 429, *range(500, 600)):
        return True
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return cause is not None and is_transient(cause)


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error; httpx and requests carry it in an object, botocore in a dictionary."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(response, "status_code", response if isinstance(response, int) else None)


def one_line(error: Exception) -> str:
    """An error's message as one line for a table cell: at most 300 characters, never empty."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
