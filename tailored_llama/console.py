"""Terminal output: progress bars, without the messages that libraries address to developers."""

import logging
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from types import ModuleType

import wrapt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from tailored_llama.progress import Progress

console = Console(stderr=True)
log = logging.getLogger(__name__)

EVERY = 15.0  # seconds between two lines


def quiet_libraries() -> None:
    """Turn off transformers' own bars and messages, and warnings that are addressed to library authors.

    It changes the whole process, so it is for processes of our own; in a user's, `quietly` is.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of PEFT: it wants a faster kernel for 4 bits
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="(peft|torch_pruning|torch).*")

    @wrapt.when_imported("transformers")
    def quiet(module: ModuleType) -> None:
        module.utils.logging.disable_progress_bar()
        module.utils.logging.set_verbosity_error()


@contextmanager
def quietly() -> Iterator[None]:
    """Quiet the libraries during a call; afterwards the caller's process warns and shows bars as before."""
    from transformers.utils import logging as messages

    verbosity, shows_bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    with warnings.catch_warnings():
        quiet_libraries()
        try:
            yield
        finally:
            messages.set_verbosity(verbosity)
            if shows_bars:
                messages.enable_progress_bar()


@contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """A progress bar on a terminal and in a notebook that can show one; elsewhere and in threads, occasional lines."""
    shows = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets"))  # a log keeps every frame
    if not shows or threading.current_thread() is not threading.main_thread():  # there is one bar at a time
        yield _lines(description)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bars = Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
    task = bars.add_task(description, total=None)

    def show(done: int, total: int) -> None:
        bars.start()  # not before the first unit of work: a cached stage shows no bar
        bars.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        bars.stop()


def _lines(description: str) -> Progress:
    begun = last = time.monotonic()
    first = None  # of a resumed stage, more is done already

    def show(done: int, total: int) -> None:
        nonlocal last, first
        first = done - 1 if first is None else first
        if (now := time.monotonic()) - last >= EVERY:
            last = now
            left = timedelta(seconds=round((now - begun) / max(1, done - first) * (total - done)))
            line = f"{description}: {done}/{total}" + (f", about {left} left" if done < total else "")
            if log.isEnabledFor(logging.INFO) and log.hasHandlers():  # of a flow's run, they are in its log
                log.info(line)
            else:
                console.print(line, highlight=False)

    return show
