"""A job as a part of a transaction: made with the others, started with the others, or never.

Specification: qapi/transaction.json. Runs on the event loop, as ``graph.transaction`` tells.
Invariant: a job that was not started has ended, with its events, when ``undo`` returns; its hooks
``abort``, ``clean`` and ``free`` have run in the task that holds the lock of the graph.
Errors: those of ``create``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeAlias

from liveblockd.graph.transaction import Action
from liveblockd.jobs.job import Job
from liveblockd.jobs.scheduler import Scheduler, Transaction

#: checks and takes what the job needs, calls ``scheduler.create(job, transaction)``, and does not
#: start it; what it raises has changed nothing
CreateJob: TypeAlias = Callable[[Transaction | None], Awaitable[Job]]


class JobAction(Action):
    """``transaction``: that of the jobs that succeed together, or None for a job by itself."""

    def __init__(
        self,
        scheduler: Scheduler,
        names: Iterable[str],
        create: CreateJob,
        transaction: Transaction | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._names = tuple(names)
        self._create = create
        self._transaction = transaction
        self._job: Job | None = None

    def names(self) -> Iterable[str]:
        """Source and target."""
        return self._names

    async def prepare(self) -> None:
        """It is there, with all it needs."""
        self._job = await self._create(self._transaction)

    async def commit(self) -> None:
        """It runs, as soon as the requests do."""
        assert self._job is not None
        self._scheduler.launch(self._job)

    async def undo(self) -> None:
        """It ends as one that was cancelled, and gives back what it has."""
        if self._job is not None:
            await self._scheduler.discard(self._job)

    async def finish(self) -> None:
        """One that has nothing to do is over when the client is answered."""
        if self._job is not None:
            await self._scheduler.over_if_immediate(self._job)
