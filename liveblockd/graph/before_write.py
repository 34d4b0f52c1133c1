"""What a disk held at one instant: kept on a target, cluster by cluster, before it is overwritten.

Specification: QEMU's docs/interop/live-block-operations (backup) and qapi/block-core.json
(BlockdevOptionsCbw). Who writes to the disk asks first (``before``); a backup that copies the rest
in the background claims what it copies (``claim``), so that nobody writes there meanwhile; who
reads the old contents (``read``) is let finish before the disk changes.

Runs on the event loop. Invariants:

* A cluster is *to do* from the beginning until its old contents are on the target. No write reaches
  a cluster that is to do, that is being copied, or whose old contents are being read.
* A cluster is copied once: of a guest's write and a job, or of two writes, one holds the claim.
* Nobody waits while holding a claim for another one: there is no deadlock.
* What a guest's write waits for is bounded: claims are of at most a few MiB, readers read no more.

Errors: OSError from ``before`` (only if the guest is to see it), ``keep`` and ``read``.
"""

from __future__ import annotations

import asyncio
import enum
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from errno import EACCES, ETIMEDOUT
from itertools import groupby
from typing import Final

from liveblockd.graph.bitmaps import DirtyBitmap
from liveblockd.storage.copy_engine import is_zero
from liveblockd.storage.driver import BlockIO, Buffer

#: bytes that a guest's write copies at a time
MAX_COPY: Final = 1 << 20
#: bytes of the disk that a reader of the old contents keeps from being written at a time
MAX_READ: Final = 1 << 20


class OnCbwError(enum.StrEnum):
    """Who suffers when old contents cannot be kept (qapi/block-core.json)."""

    BREAK_GUEST_WRITE = "break-guest-write"
    BREAK_SNAPSHOT = "break-snapshot"


class Claim:
    """A range of the disk that must not be written: bytes from ``start`` to ``end``."""

    __slots__ = ("_ended", "end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self._ended: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Return when it has ended, well or not."""
        if self._ended is None:
            self._ended = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._ended)

    def finish(self) -> None:
        """Let those go on who wait."""
        if self._ended is not None:
            self._ended.set_result(None)


class BeforeWrite:
    """See the module; ``cluster_size`` in bytes, ``todo`` is of that granularity."""

    def __init__(self, todo: DirtyBitmap) -> None:
        self.length = todo.size
        self.cluster_size = todo.granularity
        self.todo = todo
        #: what there was to do: only this can be read later
        self.accessible = todo.copy()
        #: why the old contents are lost
        self.broken: OSError | None = None
        self.on_error = OnCbwError.BREAK_GUEST_WRITE
        #: seconds that a write waits for a copy; 0: as long as it takes
        self.timeout = 0
        #: called with bytes that need no longer be copied
        self.on_done: Callable[[int], None] | None = None
        self.on_broken: Callable[[], None] | None = None
        #: stores old contents that are not zeros in another way (compressed)
        self.store: Callable[[BlockIO, int, Buffer], Awaitable[None]] | None = None
        self._copying: list[Claim] = []
        self._reading: list[Claim] = []
        self._tasks: set[asyncio.Task[None]] = set()

    # -- who writes to the disk

    def free(self, offset: int, length: int) -> bool:
        """Whether a write may go on at once."""
        if self._copying or self._reading:
            end = offset + length
            for claims in (self._copying, self._reading):
                for claim in claims:
                    if claim.start < end and offset < claim.end:
                        return False
        return not length or not self.todo.any_dirty(offset, length)

    async def before(self, source: BlockIO, target: BlockIO, offset: int, length: int) -> None:
        """Return when a write to the range may go on; OSError if it must not."""
        if self.free(offset, length):
            return
        start, end = self.clusters(offset, offset + length)
        if self.broken is None:
            try:
                await self._keep_in_time(source, target, start, end)
            except OSError as error:
                if self.on_error is OnCbwError.BREAK_GUEST_WRITE:
                    raise
                self.give_up(error)
        # A broken snapshot has nothing to do, and who copies or reads it gets no further: not
        # worth a wait.
        while self.broken is None and (reader := _overlap(self._reading, start, end)) is not None:
            await reader.wait()

    def clusters(self, start: int, end: int) -> tuple[int, int]:
        """The range in whole clusters; the last one of the disk may be short."""
        size = self.cluster_size
        return start - start % size, min(self.length, -(-end // size) * size)

    async def _keep_in_time(self, source: BlockIO, target: BlockIO, start: int, end: int) -> None:
        if not self.timeout:
            await self._keep(source, target, start, end)
            return
        # What is under way is not cancelled: a worker would go on writing to the target.
        task = asyncio.create_task(self._keep(source, target, start, end))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        done, _ = await asyncio.wait((task,), timeout=self.timeout)
        if not done:
            raise OSError(ETIMEDOUT, os.strerror(ETIMEDOUT))
        task.result()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # somebody may have stopped waiting for it

    async def _keep(self, source: BlockIO, target: BlockIO, start: int, end: int) -> None:
        while True:
            if (copying := _overlap(self._copying, start, end)) is not None:
                await copying.wait()
                continue
            run = next(self.todo.runs(start, end - start), None)
            if run is None:
                return
            offset, length = run[0], min(run[1], max(MAX_COPY, self.cluster_size))
            with self._claimed(self._copying, offset, offset + length):
                await self.copy(source, target, offset, length)
                self.done(offset, length)

    async def copy(self, source: BlockIO, target: BlockIO, offset: int, length: int) -> None:
        """Old contents from the disk to the target, under a claim."""
        data = source.read_nowait(offset, length)
        if data is None:
            data = await source.read(offset, length)
        await self.put(target, offset, data)

    async def put(self, target: BlockIO, offset: int, data: Buffer) -> None:
        """Store old contents; clusters of zeros take no room."""
        size = self.cluster_size
        if len(data) <= size:
            await self._put(target, offset, data)
            return
        view = memoryview(data)
        starts = range(0, len(data), size)
        for zero, found in groupby(starts, key=lambda start: is_zero(view[start : start + size])):
            clusters = tuple(found)
            start, end = clusters[0], min(clusters[-1] + size, len(data))
            await self._put(target, offset + start, view[start:end], zero=zero)

    async def _put(
        self, target: BlockIO, offset: int, data: Buffer, *, zero: bool | None = None
    ) -> None:
        if is_zero(data) if zero is None else zero:
            await target.write_zeroes(offset, len(data), may_unmap=True)
        elif self.store is not None:
            await self.store(target, offset, data)
        elif not target.write_nowait(offset, data):
            await target.write(offset, data)

    async def idle(self) -> None:
        """Return when no copy is under way that a write has stopped waiting for."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # -- who copies in the background

    @asynccontextmanager
    async def claim(self, start: int, end: int) -> AsyncIterator[list[tuple[int, int]]]:
        """Keep whole clusters from being written; gives (offset, length) of what is to do in them.

        The caller copies all of that, and says so by ``done``.
        """
        while (copying := _overlap(self._copying, start, end)) is not None:
            await copying.wait()
        with self._claimed(self._copying, start, end):
            yield list(self.todo.runs(start, end - start))

    def done(self, offset: int, length: int) -> None:
        """The old contents of whole clusters are on the target, or nobody wants them."""
        if self.on_done is None:
            self.todo.reset(offset, length)
            return
        count = self.todo.dirty_bytes(offset, length)
        self.todo.reset(offset, length)
        if count:
            self.on_done(count)

    def skip(self, start: int, end: int) -> int:
        """Nothing has to be copied in a range of whole clusters; bytes that had been to do.

        What is being copied just now is left to who does it: his claim is what keeps the disk as it
        is until he has read it.
        """
        skipped = 0
        for offset, length in self._unclaimed(start, end):
            skipped += self.todo.dirty_bytes(offset, length)
            self.todo.reset(offset, length)
        return skipped

    def _unclaimed(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        for claim in sorted(self._copying, key=lambda claim: claim.start):
            if claim.end <= start or claim.start >= end:
                continue
            if claim.start > start:
                yield start, claim.start - start
            start = max(start, claim.end)
        if start < end:
            yield start, end - start

    # -- who reads the old contents

    async def read(self, source: BlockIO, target: BlockIO, offset: int, length: int) -> Buffer:
        """What the disk held then; OSError(EACCES) where nobody kept it."""
        parts: list[Buffer] = []
        end = offset + length
        while offset < end:
            self.check_accessible(offset, end)
            kept, part = self.where(offset, end)
            part = min(part, MAX_READ)
            if kept:
                data = target.read_nowait(offset, part)
                parts.append(await target.read(offset, part) if data is None else data)
            else:
                with self._claimed(self._reading, offset, offset + part):
                    data = source.read_nowait(offset, part)
                    parts.append(await source.read(offset, part) if data is None else data)
                if self.broken is not None:  # the guest did not wait
                    raise _lost()
            offset += part
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def check_accessible(self, start: int, end: int) -> None:
        """OSError(EACCES) unless all of a range can be read."""
        if self.broken is not None:
            raise _lost()
        first = next(self.accessible.runs(start, end - start), None)
        if first != (start, end - start):
            raise _lost()

    def where(self, offset: int, end: int) -> tuple[bool, int]:
        """Whether old contents are on the target, and for how many bytes that goes."""
        run = next(self.todo.runs(offset, end - offset), None)
        if run is None:
            return True, end - offset
        if run[0] > offset:
            return True, run[0] - offset
        return False, run[1]

    def reading(self, start: int, end: int) -> _Claimed:
        """A context in which the disk does not change there."""
        return self._claimed(self._reading, start, end)

    def forget(self, offset: int, length: int) -> tuple[int, int]:
        """Nobody wants to read whole clusters of a range any more; (offset, length) of them."""
        size = self.cluster_size
        start = -(-offset // size) * size
        end = offset + length
        if end < self.length:
            end -= end % size
        if start >= end:
            return offset, 0
        self.accessible.reset(start, end - start)
        skipped = self.skip(start, end)
        if skipped and self.on_done is not None:
            self.on_done(skipped)
        return start, end - start

    def give_up(self, error: OSError) -> None:
        """The old contents are lost, for a write had to go on."""
        if self.broken is not None:
            return
        self.broken = error
        self.accessible.clear()
        self.todo.clear()
        if self.on_broken is not None:
            self.on_broken()

    # -- inside

    def _claimed(self, claims: list[Claim], start: int, end: int) -> _Claimed:
        return _Claimed(claims, Claim(start, end))


class _Claimed:
    """A claim as a context."""

    __slots__ = ("_claim", "_claims")

    def __init__(self, claims: list[Claim], claim: Claim) -> None:
        self._claims = claims
        self._claim = claim

    def __enter__(self) -> None:
        self._claims.append(self._claim)

    def __exit__(self, *error: object) -> None:
        self._claims.remove(self._claim)
        self._claim.finish()


def _overlap(claims: list[Claim], start: int, end: int) -> Claim | None:
    for claim in claims:
        if claim.start < end and start < claim.end:
            return claim
    return None


def _lost() -> OSError:
    return OSError(EACCES, os.strerror(EACCES))
