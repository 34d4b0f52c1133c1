"""A client's requests that are received before the loop sees them.

Runs on the loop, which it holds up for ``TURN`` and one look at most; then that goes round once.
``polling`` says when a look is worth it. What is found takes the way of what the transport
receives. No errors escape.
"""

from __future__ import annotations

import asyncio
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from liveblockd.exports.backend import Buffer
    from liveblockd.exports.nbd_commands import Session
    from liveblockd.exports.nbd_line import Line
    from liveblockd.exports.nbd_payload import Payload
    from liveblockd.exports.nbd_server import NbdServer
    from liveblockd.exports.polling import Polling

#: a client that had so many requests in one wake-up has others to wait for: no look for the next
POLL_REQUESTS: Final = 2
#: the loop goes round at least so often while requests are found by looking; nanoseconds
TURN: Final = 100_000


class Looking:
    """A part of ``NbdConnection``."""

    server: NbdServer
    session: Session | None
    _loop: asyncio.AbstractEventLoop
    _line: Line
    _polling: Polling
    _view: memoryview
    _end: int
    _tasks: set[asyncio.Task[None]]
    _begun: int
    _out: list[Buffer]
    _payload: Payload | None
    _stalled: bool
    _closing: bool
    _lost: bool
    #: requests of the last round
    _served_in_round: int
    #: the next turn of the loop begins with a look
    _poll_due: bool = False

    def _round(self) -> None:
        raise NotImplementedError

    def _round_and_look(self) -> None:
        """Do what the transport has received, and what comes right after it."""
        polling = self._polling
        polling.arrived(perf_counter_ns())
        if self.server.active is not self:
            self.server.active = self
            polling.interrupted()
        self._round()
        if polling.worthwhile and not self._poll_due:
            self._poll()
        else:
            polling.answered(perf_counter_ns())

    def _quiet(self) -> bool:
        """Whether all that has come is answered and nobody else has to do with it."""
        return (
            not self._closing
            and self._served_in_round <= POLL_REQUESTS
            and not self._tasks
            and not self._begun
            and not self._out
            and not self._stalled
            and self._payload is None
            and self.server.active is self
            and not self.server.busy()
            and not self._line.unsent
        )

    def _poll(self) -> None:
        """Receive what comes soon, for one turn of the loop at most."""
        polling, look = self._polling, self._line.look
        now = perf_counter_ns()
        turn_end = now + TURN
        while self._quiet():
            if now > turn_end:
                self._poll_due = True
                self._loop.call_soon(self._poll_on)
                break
            count = look(self._view[self._end :], polling.limit)
            if count <= 0:
                if not count:
                    polling.missed()
                break
            self.server.found_early += 1
            polling.found()
            self._end += count
            self._round()
            now = perf_counter_ns()
        polling.answered(now)

    def _poll_on(self) -> None:
        """In the next turn."""
        self._poll_due = False
        if self.session is not None and not self._lost and self._polling.worthwhile:
            self._poll()
