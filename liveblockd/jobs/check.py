"""Checks an image while it is used, and gives leaked clusters back on request.

Specification: none of QEMU's; ImageCheck of qapi/block-core.json for what is counted. Runs on the
event loop, in pieces of milliseconds: guests are served between them. Now and then the node is
drained for the time of a comparison, without I/O.

Invariants: the guest's data are never touched; a corruption is reported, never repaired. Leaked
clusters that were given back are so durably when the job ends. A cancel or a crash leaves an image
with as many leaks as before, or less.

Errors: BlockError and OSError from ``run`` when tables cannot be read or the image is gone; what a
check finds is no error of the job.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from liveblockd.errors import BlockError
from liveblockd.events import CheckCompleted
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.jobs.job import Job, JobType
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.jobs.user import JobUser
from liveblockd.storage.driver import LiveCheck, Permission

#: seconds between two pieces of work at most
MOST_REST = 0.02


class CheckFix(enum.StrEnum):
    """What is repaired of an image in use."""

    NONE = "none"
    LEAKS = "leaks"


@dataclass(frozen=True, slots=True)
class CheckParameters:
    """What the client asked for; the speed in bytes of tables per second."""

    job_id: str
    node: str
    fix: CheckFix = CheckFix.NONE
    speed: int = 0
    auto_finalize: bool = True
    auto_dismiss: bool = True


class Check(Job):
    """The job; ``offset`` and ``length`` are bytes of tables."""

    type: ClassVar[JobType] = JobType.X_LIVEBLOCK_CHECK
    is_block_job: ClassVar[bool] = False

    def __init__(
        self, parameters: CheckParameters, graph: Graph, node: Node, reports: list[CheckCompleted]
    ) -> None:
        super().__init__(
            parameters.job_id,
            speed=parameters.speed,
            auto_finalize=parameters.auto_finalize,
            auto_dismiss=parameters.auto_dismiss,
        )
        self.graph = graph
        self.node = node
        self.check: LiveCheck = node.driver.live_check(
            self._quiesced, fix_leaks=parameters.fix is CheckFix.LEAKS
        )
        self.user: JobUser | None = None
        self.reports = reports

    @asynccontextmanager
    async def _quiesced(self) -> AsyncIterator[None]:
        async with self.graph.lock, self.graph.drained(self.node):
            yield

    async def run(self) -> None:
        """Look at all tables."""
        clock = self.scheduler.clock
        async with aclosing(self.check.scan()) as pieces:
            started = clock.monotonic()
            while (count := await self._next(pieces)) is not None:
                self.offset, self.length = self.check.done, self.check.total
                self.account(count)
                # Half of the time is the guests', who need several turns of the loop a request.
                await clock.sleep(min(clock.monotonic() - started, MOST_REST))
                await self.checkpoint()
                while (delay := self.rate_delay()) > 0:
                    await self.wait(delay)
                    await self.checkpoint()
                started = clock.monotonic()
        if self.check.result.leaks_fixed:
            await self.node.driver.flush()
        self.offset = self.length

    async def _next(self, pieces: AsyncGenerator[int]) -> int | None:
        """Look at one more piece, None after the last; a cancel does not wait for a lost server."""
        try:
            with self.reading():
                return await anext(pieces, None)
        except OSError:
            self.check_wanted()
            raise

    async def commit(self) -> None:
        """Tell what was found."""
        report = self.report()
        self.reports.append(report)
        self.scheduler.publisher.publish(report)

    def report(self) -> CheckCompleted:
        """What was found, with the members of ImageCheck."""
        result = self.check.result
        names = {field.name for field in fields(CheckCompleted)} - {"id", "node_name", "messages"}
        counts: dict[str, Any] = {name: getattr(result, name) for name in names}
        return CheckCompleted(
            id=self.id, node_name=self.node.name, messages=tuple(result.messages[:20]), **counts
        )

    async def clean(self) -> None:
        """Leave the node."""
        if self.user is not None:
            async with self.graph.lock:
                await self.graph.detach(self.user)
                self.user = None


async def start_check(
    graph: Graph,
    scheduler: Scheduler,
    parameters: CheckParameters,
    reports: list[CheckCompleted],
) -> Check:
    """Check and start; raises BlockError, with the graph as it was."""
    async with graph.lock:
        node = graph.lookup(parameters.node, parameters.node)
        while node.is_filter and node.file is not None:
            node = node.file
        if not node.active:  # its tables are changing
            raise BlockError(f"Node '{node.name}' is inactive", errno=1)
        try:
            job = Check(parameters, graph, node, reports)
        except OSError as error:
            raise BlockError.from_os_error(f"Node '{node.name}'", error) from error
        scheduler.check_id(job.id)
        used = Permission.CONSISTENT_READ
        if parameters.fix is CheckFix.LEAKS:
            used |= Permission.WRITE_UNCHANGED
        scheduler.create(job)
        try:
            job.user = await JobUser.attach(graph, node, used, Permission.ALL)
        except BaseException:
            scheduler.refuse(job)
            raise
    await scheduler.start(job)
    return job
