"""The one error a user can mend."""


class InputError(ValueError):
    """Raised when a value, file or model given by the user cannot be used.

    The message is one line that names the field or file, the value found, and what is allowed. The command line and
    the flows print it without a traceback and exit with status 2.
    """
