"""The start of a job that needs time: a client that goes away does not leave half of it.

Runs on the event loop. Errors: those of the set-up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from liveblockd.errors import BlockError
from liveblockd.jobs.job import Job
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.runtime.unbroken import to_its_end

J = TypeVar("J", bound=Job)


async def start_job(scheduler: Scheduler, work: Coroutine[Any, Any, J]) -> J:
    """Start the job that ``work`` sets up; a cancel meanwhile is raised when it runs."""
    set_up = asyncio.create_task(work)
    cancelled = False
    while not set_up.done():
        try:
            await asyncio.shield(set_up)
        except asyncio.CancelledError:
            cancelled = True
        except (BlockError, OSError):
            break
    job = set_up.result()
    if scheduler.write_down is not None:
        try:
            await to_its_end(scheduler.write_down(job))
        except asyncio.CancelledError:
            cancelled = True
    # Nothing waits from here to the return: what the job does comes after the answer.
    await scheduler.start(job)
    if cancelled:
        raise asyncio.CancelledError
    return job
