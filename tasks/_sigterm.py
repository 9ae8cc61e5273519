"""Keep a SIGTERM that arrives while Python finalises objects.

Prefect turns the signal into an exception in the main thread. If it is raised within a `__del__`, for example during
garbage collection, Python prints it and goes on, and so would the run.
"""

import os
import signal
import sys
from threading import Timer

from prefect.exceptions import TerminationSignal


def heed_sigterm() -> None:
    """Send this process the signal again when Python dropped it."""
    report = sys.unraisablehook

    def send_again(dropped: "sys.UnraisableHookArgs") -> None:
        if dropped.exc_type is not TerminationSignal:
            report(dropped)
            return
        timer = Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))  # after the main thread has left the `__del__`
        timer.daemon = True
        timer.start()

    sys.unraisablehook = send_again
