"""Errors that a user can fix, helpers for all other errors, and the secrets that none of them may show."""

import re

_NAMES = ["token", "key", "keyid", "secret", "sig", "signature", "auth", "password", "passwd", "pwd", "credential"]
_ANY_CASE = "|".join("".join(f"[{letter.upper()}{letter}]" for letter in name) for name in _NAMES)
_CAPITAL = "|".join(name.capitalize() for name in _NAMES) + "|KeyId"

# A URL's password, up to its last @, or a field of its query, such as TOKEN, apikey, accessToken or X-Amz-Signature,
# but not monkey. Prefect's server and forms read it, too: no flags, and nothing that JavaScript does not know.
SECRET = (
    r"(://[^\s/:@]*:)\S+@"
    rf"|([?&;](?:(?:[\w.-]*[_.-])?(?:[Aa][Pp][Ii]|[Aa][Cc][Cc][Ee][Ss][Ss])?(?:{_ANY_CASE})"
    rf"|[\w.-]*[a-z](?:{_CAPITAL}))=)[^\s&;'\"]+"
)


def redacted(text: str) -> str:
    """A text without the passwords and tokens that stand in its URLs."""
    return re.sub(SECRET, lambda found: f"{found[1]}***@" if found[1] else f"{found[2]}***", text)


def secret_in(value: str) -> str | None:
    """Why a URL is refused that has a secret in it; None if it has none, or the value is no URL.

    A configuration is shown in messages and stored with every run, so it cannot hold a secret.
    """
    url = "".join(value.split())  # a password may have spaces
    if not re.match(r"[\w+.:-]+://", url) or (shown := redacted(url)) == url:
        return None
    return (
        f"got {shown!r}; allowed: a URL without password or token, which belong in the environment "
        "(AWS_SECRET_ACCESS_KEY, FSSPEC_SFTP_PASSWORD, …) or in ~/.config/fsspec"
    )


class InputError(ValueError):
    """Raised when a value, file or model given by the user cannot be used.

    The message is one line that names the field or file, the value got, and what is allowed. It is shown alone, and
    without secrets.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(redacted(message))


class UnreachableError(InputError):
    """Raised when a server does not answer, or cannot at the moment; the same request may succeed later."""


class NothingToReport(InputError):
    """Raised when all that a report would show has failed: these failures say why."""


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
    """An error's message as one line for a table cell: without secrets, at most 300 characters, never empty."""
    return (redacted(" ".join(str(error).split())) or type(error).__name__)[:300]
