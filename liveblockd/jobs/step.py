"""Jobs that are one piece of work without a rate: blockdev-create, x-blockdev-amend.

Specification: qapi/job.json. Runs on the event loop. Such a job is no block job, and is there until
it is dismissed. Its progress is 0 or 1, as QEMU has it.

Invariant: the work is cancelled where it waits, and has ended when the job has.
Errors: those of the work make the job fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, TypeAlias

from liveblockd.jobs.job import Job, JobCancelled, JobType

Work: TypeAlias = Callable[["OneStep"], Coroutine[Any, Any, None]]


class OneStep(Job):
    """``work`` is given the job, whose ``length`` and ``offset`` it may set."""

    is_block_job: ClassVar[bool] = False
    takes_turns = False  # it copies nothing, and clients wait for it

    def __init__(self, job_id: str, work: Work) -> None:
        super().__init__(job_id, auto_dismiss=False)
        self._work = work
        self.length = 1

    async def run(self) -> None:
        """All of it."""
        task = asyncio.create_task(self._work(self))
        task.add_done_callback(lambda _: self.wake())
        asked = False
        try:
            while not task.done():
                if self.cancel_requested and not asked:
                    asked = task.cancel()  # once: what tidies up is not to be cancelled as well
                await self.wait()
        finally:
            task.cancel()
            await asyncio.wait((task,))
        self.offset = self.length
        if task.cancelled():
            raise JobCancelled
        task.result()


class Create(OneStep):
    """blockdev-create."""

    type: ClassVar[JobType] = JobType.CREATE


class Amend(OneStep):
    """x-blockdev-amend."""

    type: ClassVar[JobType] = JobType.AMEND
