"""Progress of long stages, which the caller decides how to show, and times for readers."""

from collections.abc import Callable

Progress = Callable[[int, int], None]  # called with the units of work done and their total


def silent(done: int, total: int) -> None:
    """Show nothing."""


def duration(seconds: float) -> str:
    """Seconds in the units that a reader would choose."""
    if round(seconds) < 60:
        return f"{seconds} s" if isinstance(seconds, int) else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
