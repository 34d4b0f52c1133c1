"""A ``throttle-group``: disks that share limits, each in its turn.

Specification: QEMU docs/throttle, "Applying I/O limits to groups of disks".

Runs on: the event loop. Invariants: requests of one disk and direction go in the order in which
they came; the disks of a group that have requests waiting take turns, one request each; a request
that is cancelled while it waits leaves no trace; a disk that is being drained waits for nothing.

Errors: none but the cancel of a waiting request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Final

from liveblockd.storage.filters.buckets import Buckets, Limits

#: seconds; a timer that fires a little early would otherwise be set again for nothing
_EARLY: Final = 1e-6


class Member:
    """A disk of a group; ``free``: how many times it is being drained."""

    def __init__(self, group: ThrottleGroup) -> None:
        self.group = group
        self.free = 0
        #: by direction (is it a write): who waits, and how many bytes it wants
        self.waiting: dict[bool, deque[tuple[asyncio.Future[None], int]]] = {
            False: deque(),
            True: deque(),
        }

    def passes(self, is_write: bool, length: int) -> bool:
        """Whether a request may go now; it is counted by ``account`` then."""
        del length
        return self.group.passes(self, is_write)

    def account(self, is_write: bool, length: int) -> None:
        """A request goes that ``passes`` has let through."""
        self.group.account(is_write, length)

    async def acquire(self, is_write: bool, length: int) -> None:
        """Wait for this request's turn, and count it."""
        if self.group.passes(self, is_write):
            self.group.account(is_write, length)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (future, length)
        self.waiting[is_write].append(entry)
        self.group.wake(is_write)
        try:
            await future
        except asyncio.CancelledError:
            if entry in self.waiting[is_write]:
                self.waiting[is_write].remove(entry)
            raise

    def drain_begin(self) -> None:
        """All who wait may go, and who comes until ``drain_end``; nests."""
        self.free += 1
        for is_write, queue in self.waiting.items():
            while queue:
                self.group.let_go(is_write, queue)

    def drain_end(self) -> None:
        """Limits are kept again."""
        assert self.free > 0
        self.free -= 1


class ThrottleGroup:
    """The limits of an object, its members and whose turn it is."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._buckets = Buckets(limits, clock())
        self.members: list[Member] = []
        self._timers: dict[bool, asyncio.TimerHandle | None] = {False: None, True: None}
        self._turn = {False: 0, True: 0}

    @property
    def limits(self) -> Limits:
        """What is allowed now."""
        return self._buckets.limits

    def configure(self, limits: Limits) -> None:
        """New limits, for those that wait already too."""
        self._buckets = Buckets(limits, self._clock())
        for is_write, timer in self._timers.items():
            if timer is not None:
                timer.cancel()
                self._timers[is_write] = None
            self.wake(is_write)

    def join(self) -> Member:
        """A new member."""
        member = Member(self)
        self.members.append(member)
        return member

    def leave(self, member: Member) -> None:
        """It has no request left."""
        member.drain_begin()
        self.members.remove(member)
        for is_write in self._turn:
            self._turn[is_write] = 0

    # -- for members

    def passes(self, member: Member, is_write: bool) -> bool:
        """Whether nobody waits in this direction and the limits allow a request."""
        if member.free or self._buckets.unlimited:
            return True
        if self._timers[is_write] is not None:  # somebody waits
            return False
        return not self._buckets.wait(is_write, self._clock())

    def account(self, is_write: bool, length: int) -> None:
        """A request goes."""
        self._buckets.account(is_write, length)

    def let_go(self, is_write: bool, queue: deque[tuple[asyncio.Future[None], int]]) -> None:
        """The first of a queue goes."""
        future, length = queue.popleft()
        if not future.done():
            self._buckets.account(is_write, length)
            future.set_result(None)

    def wake(self, is_write: bool) -> None:
        """Let go who may, and come again when the next may."""
        if self._timers[is_write] is not None:
            return
        while (queue := self._next(is_write)) is not None:
            wait = self._buckets.wait(is_write, self._clock())
            if wait > _EARLY:
                loop = asyncio.get_running_loop()
                self._timers[is_write] = loop.call_later(wait, self._fired, is_write)
                return
            self._turn[is_write] += 1
            self.let_go(is_write, queue)

    def _fired(self, is_write: bool) -> None:
        self._timers[is_write] = None
        self.wake(is_write)

    def _next(self, is_write: bool) -> deque[tuple[asyncio.Future[None], int]] | None:
        """The queue whose turn it is; the turn is moved to it."""
        count = len(self.members)
        for step in range(count):
            index = (self._turn[is_write] + step) % count
            queue = self.members[index].waiting[is_write]
            if queue:
                self._turn[is_write] = index
                return queue
        return None
