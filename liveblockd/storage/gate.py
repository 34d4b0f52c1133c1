"""Who writes to a file first: a guest's small write before the copies that fill the same file.

The kernel lets one write to a file at a time. A copy of megabytes is many writes to it, one right
after the other: who waits for its turn meanwhile mostly finds the file taken again (and, once it
sleeps, nearly always: for 4 ms, after which the kernel sees to it). So copies go to a file in
turns, one at a time, and while a guest writes to it they are made of small pieces, before each of
which they look whether it waits, and let those go first who wait for the same processor: the event
loop and the guest itself would have it at the next tick else, after 4 ms (measured beside a stream
on two processors: a tenth of that; requests of more than 1 ms a third of what they were).

Runs on: ``enter`` and ``leave`` on the event loop, where a guest's write is made, and ``first`` on
a worker that makes one: they never wait; the rest on the workers that copy.

Invariants: nothing here decides what is written or in which order: a gate that two files share, or
a guest that is not seen, costs time only. Who copies waits for ``PATIENCE`` at most before a piece,
so a guest that writes without a pause slows a copy down and does not stop it; and where others have
endless work for this processor it gives way a tenth of the time. No errors escape.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Final, TypeVar, TypeVarTuple

from liveblockd.runtime.slices import Courtesy

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: bytes of one system call of a copy while a guest writes to the file: 0.1 ms. Smaller ones ask for
#: the GIL more often than they are worth.
PIECE: Final = 256 << 10
#: the same where the guest writes so seldom that few of its requests would gain by that, and where
#: there are many such guests all of them would pay for it: beside 16 with 100 writes a second all
#: copies are a tenth slower with 1 MiB. It adds a millisecond to the slowest of those writes.
SELDOM_PIECE: Final = 4 << 20
#: writes a second; fewer are seldom
SELDOM: Final = 300
#: bytes of one otherwise: large enough that what is between two does not count
LARGE_PIECE: Final = 8 << 20
#: seconds that a system call of a copy may take: a slow disk gets smaller pieces, so that a copy
#: that nobody wants any more ends soon
SLOW: Final = 0.01
#: seconds for which a guest's write is a sign that others will come
WINDOW: Final = 0.05
#: seconds after which a count of writes tells nothing of their rate
LONG_AGO: Final = 1.0
#: seconds
PATIENCE: Final = 0.001


class Gate:
    """Of one file."""

    __slots__ = (
        "_count_from",
        "_counted",
        "_courtesy",
        "_guest",
        "_large",
        "_piece",
        "_quiet_from",
        "_seen",
        "enter",
        "leave",
        "turn",
        "writes",
    )

    def __init__(self) -> None:
        #: held by the worker that copies
        self.turn = threading.Lock()
        self._guest = threading.Lock()
        #: a guest's write begins; only where it says True has ``leave`` to be called after it
        self.enter = partial(self._guest.acquire, False)
        self.leave = self._guest.release
        #: guests' writes so far; whoever makes one adds to it
        self.writes = 0
        self._seen = 0
        self._large = LARGE_PIECE
        self._quiet_from = float("-inf")
        self._piece = PIECE
        #: when ``writes`` was ``_counted`` last
        self._count_from = float("-inf")
        self._counted = 0
        self._courtesy = Courtesy()

    def first(self, call: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """On a worker: ``call(*arguments)``, which is a guest's write."""
        self.writes += 1
        entered = self.enter()
        try:
            return call(*arguments)
        finally:
            if entered:
                self.leave()

    def piece(self) -> int:
        """How many bytes the next system call of a copy may have; waits for a guest's write.

        While guests write it gives way to whoever wants this processor, too.

        With ``turn``.
        """
        now = monotonic()
        if self.writes != self._seen:
            self._seen = self.writes
            self._quiet_from = now + WINDOW
        elif now >= self._quiet_from:
            return self._large
        self._courtesy.give_way(now)
        # A lock that nobody holds is left alone: a guest that comes now must find it free, or its
        # write would not be seen by the copy.
        if self._guest.locked() and self._guest.acquire(timeout=PATIENCE):
            self._guest.release()
        elapsed = now - self._count_from
        if elapsed >= WINDOW:
            # What was long ago tells nothing: small ones until it is known.
            seldom = elapsed < LONG_AGO and self.writes - self._counted < SELDOM * elapsed
            self._piece = SELDOM_PIECE if seldom else PIECE
            self._count_from, self._counted = now, self.writes
        return min(self._piece, self._large)

    def took(self, seconds: float) -> None:
        """A system call of a copy took that long. With ``turn``."""
        if seconds > SLOW:
            self._large = max(PIECE, self._large // 2)
        elif self._large < LARGE_PIECE and seconds < SLOW / 4:
            self._large *= 2


#: few are enough: a file has one of these, which it may share with others
_gates: Final = tuple(Gate() for _ in range(64))


def gate_of(fd: int) -> Gate:
    """The gate of an open file; raises OSError."""
    file = os.fstat(fd)
    return _gates[hash((file.st_dev, file.st_ino)) % len(_gates)]
