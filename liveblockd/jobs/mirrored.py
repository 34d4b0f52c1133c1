"""Guests' writes that go to both sides of a mirror: who waits for them, and how long.

Specification: qapi/block-core.json, MirrorCopyMode ``write-blocking``. Runs on the event loop.

Invariants: a write is answered after it is in both images, or, once nobody wants the target
(``release``), in the source. What is under way to the target then goes on to its end, claimed and
in flight as before. A guest that goes away cuts no write in half.

Errors: those of the source.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from liveblockd.graph.mirror_top import Apply
from liveblockd.runtime.unbroken import to_its_end


class _Write:
    """One that is under way."""

    __slots__ = ("answer", "applied")

    def __init__(self) -> None:
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: it is in the source
        self.applied = False

    def settle(self, error: BaseException | None = None) -> None:
        """The guest goes on; the first call counts."""
        if self.answer.done():
            return
        if error is None:
            self.answer.set_result(None)
        else:
            self.answer.set_exception(error)


class MirroredWrites:
    """Of one mirror."""

    def __init__(self) -> None:
        self._released = False
        self._under_way: dict[asyncio.Task[None], _Write] = {}

    def release(self) -> None:
        """No guest waits for the target any more; twice is harmless."""
        self._released = True
        for write in self._under_way.values():
            if write.applied:
                write.settle()

    async def idle(self) -> None:
        """Return when none is under way."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    async def do(self, apply: Apply, work: Callable[[Apply], Coroutine[Any, Any, None]]) -> None:
        """Return when ``work`` has ended, which does ``apply`` and more, or ``apply`` suffices."""
        write = _Write()

        async def applied() -> None:
            await apply()
            write.applied = True
            if self._released:
                write.settle()

        task = asyncio.create_task(work(applied))
        self._under_way[task] = write
        task.add_done_callback(partial(self._ended, write))
        await to_its_end(write.answer)

    def _ended(self, write: _Write, task: asyncio.Task[None]) -> None:
        del self._under_way[task]
        if task.cancelled():
            write.settle(asyncio.CancelledError())
        else:
            write.settle(task.exception())
