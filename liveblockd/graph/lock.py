"""The lock of graph surgery: one task at a time changes the graph, and may nest.

Opening, closing, snapshots, the end of a job and who attaches to a node hold it; requests never
do. A task that holds it takes it again at once, so that a job can call ``Graph.open`` within its
own surgery.

``to_its_end`` is for the steps in between that must not be left half done by a cancel.

Runs on the event loop. Raises nothing; a cancelled waiter does not hold it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class SurgeryLock:
    """``async with graph.lock``; reentrant by task, first come first served."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._owner: asyncio.Task[Any] | None = None
        self._depth = 0

    def locked(self) -> bool:
        """Whether any task holds it."""
        return self._lock.locked()

    def held(self) -> bool:
        """Whether the current task holds it."""
        return self._owner is not None and self._owner is asyncio.current_task()

    async def __aenter__(self) -> None:
        if not self.held():
            await self._lock.acquire()
            self._owner = asyncio.current_task()
        self._depth += 1

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self.held()
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()


async def to_its_end(work: Coroutine[Any, Any, T] | asyncio.Future[T]) -> T:
    """Await ``work`` to its end even when cancelled: half of it would be worse than the wait.

    A coroutine runs in a task of its own, so it must not take the surgery lock. The cancel is
    raised after.
    """
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            cancelled = True
    result = task.result()
    if cancelled:
        raise asyncio.CancelledError
    return result
