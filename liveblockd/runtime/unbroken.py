"""Work that a cancel of its caller does not leave half done.

Specification: asyncio, "Task Cancellation". Runs on the event loop. Errors: those of the work; the
cancel, after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def to_its_end(work: Coroutine[Any, Any, T] | asyncio.Future[T]) -> T:
    """Await ``work`` to its end even when cancelled: half of it would be worse than the wait.

    A coroutine runs in a task of its own, so it must not take a lock that the caller holds. Its
    error goes before the cancel, which is raised after it.
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
