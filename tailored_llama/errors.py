"""The one error a user can mend; and what a table says of any other."""


class InputError(ValueError):
    """Raised when a value, file or model given by the user cannot be used.

    The message is one line that names the field or file, the value found, and what is allowed. The command line and
    the flows print it without a traceback and exit with status 2.
    """


def one_line(error: Exception) -> str:
    """An error's message for a cell of a table: at most 300 characters, none of them a line's end; never empty."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
