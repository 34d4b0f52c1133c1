"""The copy that ``convert`` makes: what has to be read, compressed, written, left out.

Runs on an event loop of its own; workers copy between files, and compress.
Invariants: pieces are written in the order of their offsets. A compressed write is of whole
clusters of the target. What the target has of itself (zeros in a new image, the backing file) is
not written. Errors: OSError.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

import numpy as np

from liveblockd.graph import chain
from liveblockd.graph.backend import Backend
from liveblockd.imagetool.output import Progress
from liveblockd.imagetool.source import Holds, Run, Source
from liveblockd.jobs.ratelimit import RateLimit
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.copy_engine import copy_extent, copy_nonzero, zero_clusters
from liveblockd.storage.driver import Buffer, HostFile

#: bytes read and written at a time; a multiple of every cluster size
PIECE: Final = 2 << 20
#: pieces that are read before the one that is written
AHEAD: Final = 4
#: bytes a worker copies between files before it tells how far it is
_SPAN: Final = 64 << 20


class Copy:
    """One copy; ``run`` does it."""

    def __init__(
        self, workers: WorkerPool, source: Source, target: Backend, *, sparse: int, blank: bool
    ) -> None:
        """``sparse``: bytes of zeros that are left out, 0 for none; ``blank``: all is zeros."""
        self._workers = workers
        self._source = source
        self._target = target
        self._sparse = sparse
        #: bytes that are not written read as zeros
        self._blank = blank
        self.compress = False
        self._progress = Progress(False)
        self._limit = RateLimit()
        self._pending: deque[tuple[int, asyncio.Task[Buffer]]] = deque()

    def show(self, progress: bool, bytes_per_second: int) -> None:
        """Whether to print how far it is, and how fast to be (0: as it can)."""
        self._progress = Progress(progress)
        self._limit = RateLimit(bytes_per_second)

    async def run(self) -> None:
        """All of it."""
        total = self._source.length
        file = self._target_file()
        self._progress.update(0, total)
        try:
            async for run in self._runs():
                if run.holds is Holds.BELOW:
                    continue
                if run.holds is Holds.ZEROES:
                    if not self._blank:
                        await self._drain()
                        await self._zero(run.offset, run.length)
                elif run.file is not None and file is not None:
                    await self._drain()
                    await self._copy(run, run.file, file)
                else:
                    await self._read(run)
            await self._drain()
            await self._target.flush()
            self._progress.update(total, total)
        finally:
            for _, task in self._pending:
                task.cancel()
            await asyncio.gather(*(task for _, task in self._pending), return_exceptions=True)
            self._progress.end()

    def _target_file(self) -> HostFile | None:
        """The file that the target is, if its bytes are those of the guest."""
        if not self._blank or self.compress:
            return None
        node = self._target.node
        return None if node.driver_class.driver_name == "qcow2" else chain.host_file(node)

    async def _runs(self) -> AsyncIterator[Run]:
        """What has to be done, in order; with -S 0 zeros are data, as qemu-img has it."""
        unit = self._target.node.driver.cluster_size or 1
        last: Run | None = None
        async for run in self._source.runs():
            if run.holds is Holds.ZEROES and not self._sparse:
                run = run._replace(holds=Holds.DATA)
            if not self.compress:
                yield run
                continue
            # Whole clusters: what is data in any part of one is data.
            start, end = run.offset, run.offset + run.length
            if run.holds is Holds.DATA:
                start = start // unit * unit
                end = min(-(-end // unit) * unit, self._source.length)
                if last is not None and last.holds is Holds.DATA and start <= _end(last):
                    last = last._replace(length=end - last.offset)
                    continue
                if last is not None:
                    last = last._replace(length=start - last.offset)
            elif last is not None and (start := max(start, _end(last))) >= end:
                continue
            if last is not None and last.length > 0:
                yield last
            last = Run(start, end - start, run.holds)
        if last is not None and last.length > 0:
            yield last

    async def _read(self, run: Run) -> None:
        """Begin to read a run of data; what was read before is written meanwhile."""
        for offset in range(run.offset, _end(run), PIECE):
            part = min(PIECE, _end(run) - offset)
            task = asyncio.ensure_future(self._source.read(offset, part))
            self._pending.append((offset, task))
            if len(self._pending) > AHEAD:
                await self._write_next()

    async def _drain(self) -> None:
        while self._pending:
            await self._write_next()

    async def _write_next(self) -> None:
        offset, task = self._pending[0]
        data = await task
        self._pending.popleft()
        length = len(data)
        write = self._target.write_compressed if self.compress else self._target.write
        await self._wait(length)
        for first, last in self._data_in(data):
            await write(offset + first, memoryview(data)[first:last])
        self._progress.update(offset + length, self._source.length)

    def _data_in(self, data: Buffer) -> list[tuple[int, int]]:
        """Ranges that are to be written: all but the zeros that the target has anyway."""
        length = len(data)
        unit = self._sparse
        if self.compress and unit:
            unit = self._target.node.driver.cluster_size or unit
        if not unit or not self._blank:
            return [(0, length)]
        whole = length // unit * unit
        zero = np.zeros(-(-length // unit), np.bool_)
        if whole:
            zero[: whole // unit] = zero_clusters(memoryview(data)[:whole], unit)
        edges = np.flatnonzero(np.diff(~zero, prepend=False, append=False))
        return [
            (int(first) * unit, min(int(last) * unit, length))
            for first, last in edges.reshape(-1, 2)
        ]

    async def _copy(self, run: Run, source: HostFile, target: HostFile) -> None:
        """From file to file, by a worker."""
        for done in range(0, run.length, _SPAN):
            part = min(_SPAN, run.length - done)
            here, there = run.host_offset + done, run.offset + done
            await self._wait(part)
            if self._sparse:
                await self._workers.run(
                    copy_nonzero, source.fd, here, target.fd, there, part, self._sparse
                )
            else:
                await self._workers.run(copy_extent, source.fd, here, target.fd, there, part)
            self._progress.update(there + part, self._source.length)

    async def _zero(self, offset: int, length: int) -> None:
        end = offset + length
        for start in range(offset, end, 1 << 30):
            await self._target.write_zeroes(start, min(1 << 30, end - start), may_unmap=True)

    async def _wait(self, length: int) -> None:
        """Keep to the speed."""
        if self._limit.speed:
            await asyncio.sleep(max(0, self._limit.delay(time.monotonic())))
            self._limit.account(time.monotonic(), length)


def _end(run: Run) -> int:
    return run.offset + run.length
