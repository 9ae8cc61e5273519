"""The one error a user can mend; and what a table says of any other."""


class InputError(ValueError):
    """Raised when a value, file or model given by the user cannot be used.

    The message is one line that names the field or file, the value found, and what is allowed. The command line and
    the flows print it without a traceback and exit with status 2.
    """


class UnreachableError(InputError):
    """Raised when a server does not answer, or answers that it cannot now: the same request may succeed later."""


# By name: Python's own, requests', httpx's and its kin's, aiohttp's and botocore's, whichever of them is installed.
_DROPPED = {
    "ConnectionError",
    "TimeoutError",
    "Timeout",
    "TransportError",
    "ClientConnectionError",
    "HTTPClientError",
}


def is_passing(error: BaseException) -> bool:
    """Whether the request that failed may succeed later: no connection, a dropped one, or HTTP 408, 429 or 5xx.

    What an error was raised from counts too, since libraries wrap the network's errors in their own.
    """
    if isinstance(error, InputError):
        return isinstance(error, UnreachableError)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & _DROPPED or _status(error) in (408, 429, *range(500, 600)):
        return True
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return before is not None and is_passing(before)


def _status(error: BaseException) -> int | None:
    """The HTTP status an error carries: httpx and requests as an object, botocore as a dictionary."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(response, "status_code", response if isinstance(response, int) else None)


def one_line(error: Exception) -> str:
    """An error's message for a cell of a table: at most 300 characters, none of them a line's end; never empty."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
