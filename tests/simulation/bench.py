"""A daemon's inside without a daemon: graph, scheduler and what they publish."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.events import Event, Publisher
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.jobs.commit import CommitParameters
from liveblockd.jobs.commit_start import start_commit
from liveblockd.jobs.job import Job
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.jobs.stream import Stream, StreamParameters
from liveblockd.jobs.stream_start import start_stream
from liveblockd.qapi import parse
from liveblockd.runtime.clock import Clock
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment

load_all_drivers()


class Bench:
    """``events`` keeps (name, data) of all that was published, in order."""

    def __init__(
        self,
        workers: WorkerPool | None = None,
        clock: Clock | None = None,
        *,
        secret: Callable[[str], bytes] | None = None,
    ) -> None:
        self.workers = workers or WorkerPool()
        self.publisher = Publisher()
        self.publisher.subscribe(self._note)
        environment = Environment(workers=self.workers, publisher=self.publisher)
        if secret is not None:
            environment = replace(environment, secret=secret)
        self.graph = Graph(environment)
        self.scheduler = Scheduler(self.publisher, clock=clock)
        self.events: list[tuple[str, dict[str, Any]]] = []

    def _note(self, event: Event) -> None:
        self.events.append((event.name, event.data()))

    @staticmethod
    def options(**members: Any) -> BlockdevOptions:
        """Of blockdev-add; ``_`` in the names stands for ``-``."""
        return parse(BlockdevOptions, {k.replace("_", "-"): v for k, v in members.items()})

    async def open(self, **members: Any) -> Node:
        """blockdev-add."""
        return await self.graph.open(self.options(**members))

    async def stream(self, device: str, job_id: str = "s", **options: Any) -> Stream:
        """block-stream."""
        return await start_stream(
            self.graph, self.scheduler, StreamParameters(job_id, device, **options)
        )

    async def commit(self, device: str, job_id: str = "c", **options: Any) -> Job:
        """block-commit."""
        return await start_commit(
            self.graph, self.scheduler, CommitParameters(job_id, device, **options)
        )

    async def end(self, job: Job, status: str = "null", seconds: float = 100) -> None:
        """Wait until the job has ``status``."""
        async with asyncio.timeout(seconds):
            while job.status != status:  # noqa: ASYNC110
                await asyncio.sleep(0 if job.length < 1 << 20 else 0.0005)

    def course(self, job_id: str = "s") -> list[str]:
        """The events of a job, shortened: its statuses and BLOCK_JOB_* without the prefix."""
        found = []
        for name, data in self.events:
            if name == "JOB_STATUS_CHANGE" and data["id"] == job_id:
                found.append(data["status"])
            elif name.startswith("BLOCK_JOB_") and job_id in (data.get("device"), data.get("id")):
                found.append(name.removeprefix("BLOCK_JOB_"))
        return found

    def completion(self, job_id: str = "s") -> dict[str, Any]:
        """Data of the last BLOCK_JOB_COMPLETED of a job."""
        found = [d for n, d in self.events if n == "BLOCK_JOB_COMPLETED" and d["device"] == job_id]
        return found[-1]

    async def close(self) -> None:
        """As at quit."""
        await self.scheduler.cancel_all()
        await self.graph.close()
        await self.workers.idle()
        self.workers.close()
