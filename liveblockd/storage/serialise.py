"""Keeps requests that overlap apart where one of them reads, changes and writes whole blocks.

With O_DIRECT a write of part of a block is a read-modify-write; another write to the same block in
between would be undone by it. Requests that only write whole blocks pass each other freely.

Runs on: the event loop. Invariant: of two overlapping requests inside, neither is exclusive.
No errors escape.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Section:
    """One request inside; ``start`` and ``end`` in bytes."""

    start: int
    end: int
    exclusive: bool
    waiters: list[asyncio.Future[None]] = field(default_factory=list)


class Serialiser:
    """The requests under way on one file."""

    def __init__(self) -> None:
        self._inside: list[Section] = []

    async def enter(self, start: int, end: int, *, exclusive: bool) -> Section:
        """Wait until no overlapping request is in the way; give the result to ``leave``."""
        while (blocker := self._blocker(start, end, exclusive=exclusive)) is not None:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            blocker.waiters.append(waiter)
            await waiter
        section = Section(start, end, exclusive)
        self._inside.append(section)
        return section

    def enter_now(self, start: int, end: int) -> Section | None:
        """``enter``, not exclusive, if nobody is in the way; else None."""
        if self._blocker(start, end, exclusive=False) is not None:
            return None
        section = Section(start, end, exclusive=False)
        self._inside.append(section)
        return section

    def leave(self, section: Section) -> None:
        """The request has ended, well or not."""
        self._inside.remove(section)
        for waiter in section.waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _blocker(self, start: int, end: int, *, exclusive: bool) -> Section | None:
        for other in self._inside:
            if (exclusive or other.exclusive) and other.start < end and start < other.end:
                return other
        return None
