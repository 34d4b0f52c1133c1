"""The lock of graph surgery: one task at a time changes the graph, and may nest.

Opening, closing, snapshots, the end of a job and who attaches to a node hold it; requests never
do. A task that holds it takes it again at once, so that a job can call ``Graph.open`` within its
own surgery.

Runs on the event loop. Raises nothing; a cancelled waiter does not hold it.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any


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
