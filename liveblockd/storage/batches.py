"""Writes to one file that a worker makes by the batch.

What a round of the event loop begins goes to a worker as one job; while ``MAX_JOBS`` jobs are under
way the next batch grows. So a write costs the loop no coroutine, no task and no future, and the
more there is to do the less each one costs.

Runs on: the event loop; the jobs (``hostcalls.write_batch``) on workers.

Invariants: ``done`` of every write that ``add`` took is called once, on the loop, after its system
call; in one batch the writes are made in the order in which they came. Errors: none escape; the
``OSError`` of a write goes to its ``done``.
"""

from __future__ import annotations

import asyncio
import logging
from errno import EIO
from functools import partial
from typing import Final

from liveblockd.runtime.workers import JobGroup
from liveblockd.storage import hostcalls
from liveblockd.storage.driver import Buffer, Done
from liveblockd.storage.gate import gate_of

log = logging.getLogger(__name__)

#: jobs of one file under way at once
MAX_JOBS: Final = 2
#: bytes after which a batch is closed
MAX_BYTES: Final = 2 << 20


class WriteBatches:
    """The writes of one descriptor; ``jobs`` has to be idle before that is closed."""

    def __init__(self, jobs: JobGroup, fd: int) -> None:
        self._jobs = jobs
        self._fd = fd
        self._gate = gate_of(fd)
        self._writes: list[tuple[int, Buffer]] = []
        self._done: list[Done] = []
        self._under_way = 0
        self._due = False
        #: jobs and writes so far
        self.jobs = self.writes = 0

    def __bool__(self) -> bool:
        return bool(self._under_way or self._writes)

    def add(self, offset: int, data: Buffer, done: Done) -> None:
        """Write ``data``, which stays as it is until ``done`` is called."""
        self._writes.append((offset, data))
        self._done.append(done)
        if not self._due and self._under_way < MAX_JOBS:
            self._due = True
            asyncio.get_running_loop().call_soon(self._submit)

    def _submit(self) -> None:
        self._due = False
        while self._writes and self._under_way < MAX_JOBS:
            count, size = 0, 0
            for _, data in self._writes:
                size += len(data)
                count += 1
                if size >= MAX_BYTES:
                    break
            writes, self._writes = self._writes[:count], self._writes[count:]
            done, self._done = self._done[:count], self._done[count:]
            try:
                job = self._jobs.submit(self._gate.first, hostcalls.write_batch, self._fd, writes)
            except RuntimeError as closed:  # the pool is gone
                self._tell(done, [OSError(EIO, str(closed))] * count)
                continue
            self._under_way += 1
            self.jobs += 1
            self.writes += count
            job.add_done_callback(partial(self._ended, done))

    def _ended(self, done: list[Done], job: asyncio.Future[list[OSError | None] | None]) -> None:
        self._under_way -= 1
        error = job.exception()
        if error is None:
            self._tell(done, job.result())
        else:
            failed = error if isinstance(error, OSError) else OSError(EIO, repr(error))
            self._tell(done, [failed] * len(done))
        self._submit()

    @staticmethod
    def _tell(done: list[Done], errors: list[OSError | None] | None) -> None:
        for number, call in enumerate(done):
            try:
                call(None if errors is None else errors[number])
            except Exception:  # a defect of one request is not to hold up the others
                log.exception("the end of a write")
