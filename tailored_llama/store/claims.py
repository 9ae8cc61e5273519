"""Claims: they keep a machine from computing what another one with the same URL has in hand.

A claim is a small file `.claims/KEY.NUMBER` at the URL, created only where none is and rewritten by its holder alone.
The highest number counts. A claim that has not changed for as long as a `Lease` says has expired: its holder is dead or
cut off, and whoever creates the next number takes over. The one that waits measures these seconds with its own
monotonic clock, so clocks of machines are never compared.

A claim saves work, no more. That an artifact is published once is up to its manifest, which is created only where none
is.
"""

import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread

from tailored_llama.errors import UnreachableError
from tailored_llama.store import remote
from tailored_llama.store.remote import Remote

CLAIMS = ".claims"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """How long a claim holds, in seconds, and the clock that measures it."""

    renew: float = 30.0  # between renewals: three small requests for each stage under way
    expires: float = 120.0  # three renewals may fail, as while a server restarts, before another machine takes over
    look: float = 5.0  # between the looks of one that waits: less than a stage costs, even on a small model
    now: Callable[[], float] = time.monotonic
    wait: Callable[[Event, float], bool] = Event.wait  # for an event, so many seconds at most; whether it is set


LEASE = Lease()


@dataclass(frozen=True)
class _Seen:
    """The claim with the highest number, as it was at one look; without token and holder if it is unreadable."""

    number: int
    content: bytes
    token: str | None
    holder: str


class Claim:
    """This process's claim to one artifact; use it by `claimed`."""

    def __init__(
        self,
        at: Remote,
        stage: str,
        key: str,
        mark: Path,
        adopt: Callable[[], object],
        lease: Lease,
        check: Callable[[], None] | None,
    ) -> None:
        self._check = check
        self._at, self._key, self._mark, self._adopt, self._lease = at, key, mark, adopt, lease
        self._name = f"{stage} {key[:12]}"
        self._token = uuid.uuid4().hex
        self._number: int | None = None  # of the claim that this process holds
        self._renewed = 0.0
        self._lock = Lock()  # the thread that renews, and the one that takes

    def is_lost(self) -> bool:
        """Whether it is not held, or was not renewed in time; no request is sent."""
        return self._number is None or self._lease.now() - self._renewed > self._lease.expires

    def hold(self) -> bool:
        """Renew the claim, or wait for it; return False if another machine published the artifact meanwhile."""
        with self._lock:
            return self._renew() or self._take()

    def keep(self, until: Event) -> None:
        """Renew the claim from time to time; a renewal that fails is tried again."""
        while not self._lease.wait(until, self._lease.renew):
            with self._lock, suppress(Exception):  # without an answer, `is_lost` tells, and so does the next push
                if self._number is not None and not self._renew():
                    log.warning("%s: another machine took over, because this one could not renew", self._name)

    def release(self) -> None:
        """Remove the claim and the expired ones before it, if it is still held; nobody waits for it then."""
        with self._lock:
            if self._renew():
                numbers = [number for number in _numbers(self._at, self._key) if number <= (self._number or 0)]
                remote.remove_files(self._at, [_path(self._key, number) for number in numbers])  # its own last
                self._number = None

    def _renew(self) -> bool:
        if self._number is None:
            return False
        seen, now = _look(self._at, self._key), self._lease.now()
        if seen is None or (seen.number, seen.token) != (self._number, self._token):
            self._number = None
            return False
        remote.overwrite(self._at, _path(self._key, self._number), self._content())
        self._renewed = now
        return True

    def _take(self) -> bool:
        dead = self._mark.read_text(errors="replace").split()
        with self._mark.open("a") as mark:
            mark.write(f"{self._token}\n")
        last, since = None, self._lease.now()
        while True:
            seen, now = _look(self._at, self._key), self._lease.now()
            is_dead = seen is not None and seen.token in dead
            if seen and not is_dead and (last is None or last.token != seen.token):
                log.info("%s: %s has it in hand, waiting", self._name, seen.holder)
            if seen != last:
                last, since = seen, now
            if seen is None or is_dead or now - since > self._lease.expires:
                number = seen.number + 1 if seen else 1
                if remote.create(self._at, _path(self._key, number), self._content(), f"claiming {self._name}"):
                    if seen:
                        log.info("%s: taken over, as %s has stopped renewing its claim", self._name, seen.holder)
                    self._number, self._renewed = number, now
                    return True
            elif self._adopt():
                return False
            else:
                if self._check:
                    self._check()
                self._lease.wait(Event(), self._lease.look)

    def _content(self) -> bytes:
        """Different at each renewal."""
        holder = f"{socket.gethostname()}, process {os.getpid()}"
        return json.dumps({"holder": holder, "token": self._token, "renewal": uuid.uuid4().hex}).encode()


@contextmanager
def claimed(
    at: Remote,
    stage: str,
    key: str,
    mark: Path,
    adopt: Callable[[], object],
    lease: Lease,
    check: Callable[[], None] | None = None,
) -> Iterator[Claim]:
    """Hold the claim to an artifact, waiting while another machine holds it, and renew it until the block ends.

    `mark` is a lock file of this working copy, and this process holds its lock. It lists the earlier claims of the
    working copy. Their processes have ended, as they held the lock: nobody waits for those claims. `adopt` takes the
    artifact over if another machine published it, and then returns something true. That ends the wait, and the claim is
    not held. `check` is called between two looks; what it raises ends the wait, too.
    """
    claim, ended = Claim(at, stage, key, mark, adopt, lease, check), Event()
    claim.hold()
    context = copy_context()  # by which Prefect knows whose log it is
    thread = Thread(target=context.run, args=(claim.keep, ended), name=f"claim {key[:12]}", daemon=True)
    thread.start()
    unreachable = False
    try:
        yield claim
    except UnreachableError:
        unreachable = True  # the claim is left to expire, so that this machine's next try comes before the others
        raise
    finally:
        ended.set()
        if not unreachable:
            with suppress(Exception):  # it expires by itself
                claim.release()


def _look(at: Remote, key: str) -> _Seen | None:
    while numbers := _numbers(at, key):
        path = _path(key, numbers[-1])
        if (content := remote.read(at, path)) is None:
            continue  # it was removed since it was listed
        try:
            data = json.loads(content)
            token, holder = str(data["token"]) or None, " ".join(str(data["holder"]).split())[:100]
        except (ValueError, TypeError, KeyError, RecursionError):
            token, holder = None, "somebody whose claim is unreadable"
        return _Seen(numbers[-1], content, token, holder)
    return None


def _numbers(at: Remote, key: str) -> list[int]:
    matches = (re.fullmatch(rf"{key}\.([1-9][0-9]*)", name) for name in remote.names(at, CLAIMS))
    return sorted(int(match[1]) for match in matches if match)


def _path(key: str, number: int) -> str:
    return f"{CLAIMS}/{key}.{number}"
