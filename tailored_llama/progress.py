"""The callback by which long stages report progress; the caller decides how to show it."""

from typing import Protocol


class Progress(Protocol):
    """Called with the units of work done and their total."""

    def __call__(self, done: int, total: int) -> None: ...


def silent(done: int, total: int) -> None:
    """Show nothing."""
