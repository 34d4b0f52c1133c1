"""When to look at the socket of a client again instead of waiting for its next request.

A client that sends one request at a time answers a reply within microseconds. Going to sleep
meanwhile costs more than the request: the turn of the event loop, and the time that an idle
processor takes to wake up (tens of microseconds in a virtual machine). So, as QEMU's iothreads do
(``poll-max-ns``), the loop's thread looks for the next request for a while before it sleeps.

Pure: times are nanoseconds of one clock that the caller reads.

Invariants: looking is worth it only after a run of requests that came quickly after the reply
before them, and each time in vain makes that run longer; so a client that thinks between its
requests costs next to nothing, and one that is silent nothing at all. Errors: none.
"""

from __future__ import annotations

from typing import Final

#: how long a look takes at most where nobody says otherwise; nanoseconds. A client on another
#: processor, that sleeps until the reply, needs 25 to 50 us to wake up in a virtual machine.
POLL_MAX: Final = 100_000
#: a request that came without a look is quick up to here: a wake-up is in it; nanoseconds
QUICK: Final = 200_000
#: quick requests before the first look
FIRST_RUN: Final = 16
#: doublings of that by looks in vain
MAX_DOUBLINGS: Final = 9
#: looks that found something before one doubling is taken back
HITS: Final = 16


class Polling:
    """Of one client; ``limit`` is how long a look may take, 0: there is none."""

    __slots__ = ("_answered", "_doublings", "_hits", "_run", "limit")

    def __init__(self, limit: int = POLL_MAX) -> None:
        self.limit = limit
        self._answered = 0
        self._doublings = 0
        self._run = 0
        self._hits = 0

    @property
    def worthwhile(self) -> bool:
        """Whether a look may find something."""
        return self._run >= FIRST_RUN << self._doublings and self.limit > 0

    def answered(self, now: int) -> None:
        """Every request has its reply."""
        self._answered = now

    def arrived(self, now: int) -> None:
        """A request came without a look."""
        if now - self._answered < QUICK:
            self._run += 1
        else:
            self._run = 0

    def found(self) -> None:
        """A request came during a look."""
        self._run += 1
        self._hits += 1
        if self._hits >= HITS:
            self._hits = 0
            if self._doublings:
                self._doublings -= 1

    def missed(self) -> None:
        """A look was in vain."""
        self._run = self._hits = 0
        if self._doublings < MAX_DOUBLINGS:
            self._doublings += 1

    def interrupted(self) -> None:
        """Somebody else is busy here: a run begins anew."""
        self._run = 0
