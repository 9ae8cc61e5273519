"""SIGTERM is heeded wherever it meets a run."""

import os
import signal
import sys
import time

import pytest
from prefect.exceptions import TerminationSignal

from tasks._sigterm import heed_sigterm


class SignalledWhileClearedUp:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)  # the signal's handler runs before this ends


def as_prefect_does(number: int, frame: object) -> None:
    raise TerminationSignal(signal=number)


def test_a_signal_that_python_drops_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    heed_sigterm()
    before = signal.signal(signal.SIGTERM, as_prefect_does)
    try:
        SignalledWhileClearedUp()
        with pytest.raises(TerminationSignal):
            time.sleep(5)
    finally:
        signal.signal(signal.SIGTERM, before)
