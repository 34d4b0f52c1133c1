"""Who outside is being served: what work in the background gives way to.

Copies of jobs can keep every processor busy. A guest's request then waits until the event loop gets
one, and its own client until it gets one too: on two processors that is most of the time that a
small write takes (measured). So servers count what they are asked for, and who works in the
background asks here how many processors to take: for a guest one is left free, for a monitor there
are no more copies than processors (one fewer makes its answers only little faster, and where it
asks without a pause the copies four times slower).

The same goes for long work on the loop itself: between its steps it gives others their turn, and
where guests are served also the processor, which a guest may be waiting for.

Runs on: the event loop. Counting is one addition, on the request path; time is an argument.
No errors escape.
"""

from __future__ import annotations

import asyncio
import os
from time import monotonic
from typing import Final

from liveblockd.runtime.slices import Courtesy

#: seconds for which a request is taken as a sign that others will come
WINDOW: Final = 0.05


class Arrivals:
    """Requests of one kind of client."""

    __slots__ = ("_recent_until", "_seen", "requests")

    def __init__(self) -> None:
        #: so far; whoever is asked for something adds to it
        self.requests = 0
        self._seen = 0
        self._recent_until = float("-inf")

    def is_recent(self, now: float) -> bool:
        """Whether there were requests in the last moments before ``now`` (seconds).

        Each caller's look counts what came since anybody's last one.
        """
        if self.requests != self._seen:
            self._seen = self.requests
            self._recent_until = now + WINDOW
        return now < self._recent_until


class Demand:
    """Of guests and of monitors; one a daemon."""

    __slots__ = ("_courtesy", "guests", "monitors", "processors")

    def __init__(self, processors: int | None = None) -> None:
        #: that this process may run on
        self.processors = len(os.sched_getaffinity(0)) if processors is None else processors
        self.guests = Arrivals()
        self.monitors = Arrivals()
        self._courtesy = Courtesy()

    def width(self, wanted: int, now: float) -> int:
        """How many of ``wanted`` threads work in the background may keep busy now (seconds)."""
        if self.guests.is_recent(now):
            return max(1, min(wanted, self.processors - 1))
        if self.monitors.is_recent(now):
            return max(1, min(wanted, self.processors))
        return wanted

    def is_served(self) -> bool:
        """Whether a guest is served now, which long steps would keep waiting."""
        return self.guests.is_recent(asyncio.get_running_loop().time())

    async def give_turn(self) -> None:
        """Between two steps of long work: requests are served, and who makes them can run."""
        if self.is_served():
            self._courtesy.give_way(monotonic())
        await asyncio.sleep(0)
