"""blockdev-backup: copy a disk as it is at one instant, while guests go on writing to it.

Specification: qapi/block-core.json (BackupCommon), QEMU's docs/interop/live-block-operations and
bitmaps. Runs on the event loop; host files are copied by workers.

Why the copy is of one instant: the filter ``copy-before-write`` comes to stand above the source
while no request is in flight, and from then on lets nobody write a cluster whose old contents are
not on the target. The job copies the rest in the background, each piece under a claim of the filter
(``graph/before_write.py``). What is still to do has not been written since the instant: where the
source keeps it stays as it was found out, for as long as it is to do.

A guest's write waits for one piece at most; pieces that a worker copies are kept to a millisecond.
The source is only read. ``prepare`` makes the target durable before BLOCK_JOB_COMPLETED.

Errors: those of ``CopyJob``; what broke the snapshot with on-cbw-error=break-snapshot.
"""

from __future__ import annotations

import enum
import os
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing, suppress
from dataclasses import dataclass
from errno import ECANCELED
from typing import ClassVar, Final

from liveblockd.graph import chain, surgery
from liveblockd.graph.before_write import BeforeWrite, OnCbwError
from liveblockd.graph.bitmaps import DirtyBitmap
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.jobs.copying import FIRST_CHUNK, MIB, READ_CHUNK, CopyJob, PieceFailedError
from liveblockd.jobs.held_nodes import HeldNodes
from liveblockd.jobs.host_copy import copy_piece, guest_is_served
from liveblockd.jobs.job import BlockdevOnError, ErrorAction, JobType
from liveblockd.jobs.mirror_job import MirrorSyncMode
from liveblockd.jobs.pieces import Planner, Run, split
from liveblockd.jobs.user import JobUser
from liveblockd.storage.driver import (
    BlockIO,
    Buffer,
    ExtentKind,
    Permission,
)

BLOCKER: Final = "block device is in use by block job: backup"
#: runs that are looked at before the first of them is copied
LOOK_AHEAD: Final = 2048
#: below this, reading and writing is cheaper than a worker's copy
LEAST_COPY: Final = 128 * 1024
#: seconds; a copy that is done sooner may be of more bytes (clones are)
SOON: Final = 0.001
MOST_CHUNK: Final = 64 * MIB
#: the same while no guest is served: the first write after that waits for one such piece at most
SOON_ALONE: Final = 0.005
#: so many times longer may it take where many jobs copy
MOST_CROWDING: Final = 2.0


class BitmapSyncMode(enum.StrEnum):
    """What becomes of the bitmap (qapi/block-core.json)."""

    ON_SUCCESS = "on-success"
    NEVER = "never"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class BackupParameters:
    """What the client asked for, as it can be written down and read again; in bytes."""

    job_id: str
    device: str
    target: str
    sync: MirrorSyncMode
    speed: int = 0
    bitmap: str | None = None
    bitmap_mode: BitmapSyncMode | None = None
    compress: bool = False
    on_source_error: BlockdevOnError = BlockdevOnError.REPORT
    on_target_error: BlockdevOnError = BlockdevOnError.REPORT
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    filter_node_name: str | None = None
    discard_source: bool = False
    max_workers: int = 64
    max_chunk: int = 0
    min_cluster_size: int = 0
    auto_finalize: bool = True
    auto_dismiss: bool = True


class Backup(CopyJob):
    """Copies ``source`` to ``target``; ``core`` is the filter's, ``bitmap`` is frozen already.

    ``offset`` and ``length`` count bytes that are or were to be copied, by whomever.
    """

    type: ClassVar[JobType] = JobType.BACKUP
    tries_again: ClassVar[bool] = True

    def __init__(
        self,
        parameters: BackupParameters,
        graph: Graph,
        source: Node,
        target: Node,
        core: BeforeWrite,
    ) -> None:
        super().__init__(
            parameters.job_id,
            speed=parameters.speed,
            on_error=parameters.on_source_error,
            auto_finalize=parameters.auto_finalize,
            auto_dismiss=parameters.auto_dismiss,
        )
        self.parameters = parameters
        self.graph = graph
        self.source = source
        self.target = target
        self.core = core
        self.granularity = core.cluster_size
        self.parallel = min(parameters.max_workers, self.parallel)  # type: ignore[misc]
        self._most_chunk = parameters.max_chunk or MOST_CHUNK
        self._copy_chunk = min(FIRST_CHUNK, self._most_chunk)
        self._served = False
        self._succeeded = False
        # Guests' writes do the copying, whenever they come.
        self.takes_turns = parameters.sync is not MirrorSyncMode.NONE
        core.on_done = self._count
        core.on_broken = self.wake
        core.on_error = parameters.on_cbw_error
        if parameters.compress:
            core.store = self._store_compressed
        # Given back by ``clean``.
        self.bitmap: DirtyBitmap | None = None
        self.filter: Node | None = None
        self.user: JobUser | None = None
        # Given back by ``free``.
        self.held = HeldNodes(graph, BLOCKER)

    def begin(self, bitmap: DirtyBitmap | None) -> None:
        """What there is to do is settled; writes are recorded apart from now on.

        The source is drained: what was written before is in ``bitmap``.
        """
        todo = self.core.todo
        if self.parameters.sync is MirrorSyncMode.BITMAP:
            assert bitmap is not None
            todo.merge(bitmap)
        else:
            todo.set(0, todo.size)
        self.length = todo.dirty_bytes(0, todo.size)
        if bitmap is not None:
            bitmap.freeze()
            self.bitmap = bitmap

    def nothing_held(self) -> AbstractContextManager[None]:
        """Of both sides."""
        return self.graph.nothing_held(self.source, self.target)

    def cut_off(self, silence: float) -> None:
        """The target is worth nothing any more, and no guest has to suffer for it."""
        self.core.on_error = OnCbwError.BREAK_SNAPSHOT
        self.graph.cut_off(self.target, silence)

    def stop_mattering(self) -> None:
        """Guests' writes go on without their old contents being kept."""
        self.core.on_error = OnCbwError.BREAK_SNAPSHOT
        self.core.give_up(OSError(ECANCELED, os.strerror(ECANCELED)))

    def images(self) -> tuple[list[Node], Node | None]:
        """Source and target."""
        return chain.chain(self.source)[:1], chain.skip_filters(self.target)

    def let_go(self) -> None:
        """Copies do not wait for a target whose server is gone."""
        self.graph.stop_waiting(self.target)

    @property
    def end(self) -> int:
        """Where the disk ends."""
        return self.core.length

    def _count(self, count: int) -> None:
        self.offset += count

    def _update_offset(self) -> None:
        """Guests' writes move it on too: ``_count`` does."""

    def action_on(
        self, operation: str, code: int, policy: BlockdevOnError | None = None
    ) -> ErrorAction:
        """By the policy of the side that failed."""
        parameters, reading = self.parameters, operation == "read"
        own = parameters.on_source_error if reading else parameters.on_target_error
        return super().action_on(operation, code, policy or own)

    # -- the work

    @property
    def disk(self) -> Node:
        """What is read: ``source``, or what is below it where that was the filter of another job.

        Such a filter goes when its job ends; the own filter stands on what is left.
        """
        return self.source if self.filter is None else self.filter.children["file"].child

    async def run(self) -> None:
        """Copy, or with sync=none let guests' writes do it until the job is cancelled."""
        while self.parameters.sync is MirrorSyncMode.NONE:
            await self.checkpoint()
            await self.wait()
        await super().run()

    async def checkpoint(self) -> None:
        """Also fail once the old contents are lost."""
        await super().checkpoint()
        if self.core.broken is not None:
            raise self.core.broken

    async def plan(self, offset: int) -> tuple[list[Run], int]:
        """Pieces for the next stretch of what is to do."""
        assert self.user is not None
        with self.reading():
            return await self.user.run(lambda: self._plan(offset))

    async def _plan(self, offset: int) -> tuple[list[Run], int]:
        pieces: list[Run] = []
        while offset < self.end and len(pieces) < LOOK_AHEAD:
            run = next(self.core.todo.runs(offset, self.end - offset), None)
            if run is None:
                return pieces, self.end
            found, offset = await self._plan_run(run[0], run[0] + run[1])
            pieces.extend(found)
        return pieces, offset

    async def _plan_run(self, start: int, limit: int) -> tuple[list[Run], int]:
        """Pieces from ``start`` on, and how far they go: ``limit``, or where it got too much."""
        planned: list[Run] = []
        position = end = start
        async with aclosing(self._look(start, limit)) as runs:
            async for run in runs:
                planned.append(run)
                position = run.end
                end = position - (position - start) % self.granularity
                if len(planned) >= LOOK_AHEAD and end > start:
                    break
        if position == limit:
            end = limit
        planner = Planner(start, end, self.granularity, least_copy=LEAST_COPY)
        pieces: list[Run] = []
        for run in planned:
            if run.offset < end:
                pieces.extend(planner.feed(run.part(run.offset, min(run.end, end))))
        pieces.extend(planner.finish())
        at = start
        for piece in [*pieces, Run(end, 0, ExtentKind.UNALLOCATED)]:
            if piece.offset > at:
                self._leave_out(at, piece.offset)
            at = piece.end
        return pieces, end

    def _leave_out(self, start: int, end: int) -> None:
        """The source has nothing there that the target does not have."""
        skipped = self.core.skip(start, end)
        if self.parameters.sync is MirrorSyncMode.TOP:
            self.length -= skipped
        else:
            self.offset += skipped

    async def _look(self, start: int, limit: int) -> AsyncGenerator[Run, None]:
        """What the source holds; UNALLOCATED stands for what need not be copied."""
        top = self.parameters.sync is MirrorSyncMode.TOP
        base = chain.layer_below(self.disk) if top else None
        position = start
        async with aclosing(chain.resolve(self.disk, base, start, limit - start)) as found:
            async for run in found:
                if run.kind is ExtentKind.DATA:
                    yield Run(position, run.length, run.kind, run.layer, run.host_offset)
                elif run.kind is ExtentKind.COMPRESSED or top:
                    yield Run(position, run.length, run.kind)
                else:
                    async for part in self._zeros(position, position + run.length):
                        yield part
                position += run.length

    async def _zeros(self, start: int, end: int) -> AsyncGenerator[Run, None]:
        """UNALLOCATED where the target reads as zeros already, whatever lies below it.

        A target can be opened without the backing file that its header names: what nobody wrote
        reads as zeros now, and as something else when it is restored.
        """
        layer = chain.skip_filters(self.target)
        assert layer is not None
        alone = layer.backing is None and not layer.driver.backing_file
        while start < end:
            for extent in await self.target.map(start, end - start):
                zero = extent.kind is ExtentKind.ZERO
                zero |= extent.kind is ExtentKind.UNALLOCATED and alone
                kind = ExtentKind.UNALLOCATED if zero else ExtentKind.ZERO
                yield Run(start, extent.length, kind)
                start += extent.length

    async def move(self, piece: Run) -> None:
        """Copy what is still to do of one piece."""
        assert self.user is not None
        await self.user.run(lambda: self._move(piece))

    async def _move(self, piece: Run) -> None:
        async with self.core.claim(piece.offset, piece.end) as runs:
            for offset, length in runs:
                await self._copy_or_parts(piece.part(offset, offset + length))
                if self.parameters.discard_source:
                    with suppress(OSError):
                        await self.disk.discard(offset, length)

    async def _copy_or_parts(self, piece: Run) -> None:
        """Where it fails, and the bitmap is to tell what was copied, all but the clusters that do.

        Raises the first error also where it goes well then: clients are to hear of it.
        """
        try:
            await self._copy(piece)
        except PieceFailedError:
            told = self.parameters.bitmap_mode is BitmapSyncMode.ALWAYS
            if told and piece.length > self.granularity and not self.cancel_requested:
                clusters = -(-piece.length // self.granularity)
                middle = piece.offset + clusters // 2 * self.granularity
                for half in (piece.part(piece.offset, middle), piece.part(middle, piece.end)):
                    with suppress(PieceFailedError):
                        await self._copy_or_parts(half)
            raise
        self.core.done(piece.offset, piece.length)

    async def _copy(self, piece: Run) -> None:
        if piece.kind is ExtentKind.ZERO:
            try:
                await self.target.write_zeroes(piece.offset, piece.length, may_unmap=True)
            except OSError as error:
                raise PieceFailedError("write", error) from error
            return
        if (
            piece.kind is ExtentKind.DATA
            and not self.parameters.compress
            and (source := chain.host_file(piece.layer)) is not None
        ):
            try:
                here, at = (piece.offset, piece.length), piece.host_offset
                if await copy_piece(
                    self.graph, source, at, self.target, here, may_unmap=True, unit=self.granularity
                ):
                    return
            except OSError:
                # Which side failed? Reading and writing it by turns tells, or gets around it.
                pass
        chunk = min(READ_CHUNK, self._most_chunk)
        for part in split(piece, max(chunk // self.granularity, 1) * self.granularity):
            await self._read_and_write(part)

    async def _read_and_write(self, piece: Run) -> None:
        try:
            with self.reading():
                data = await self.disk.read(piece.offset, piece.length)
        except OSError as error:
            raise PieceFailedError("read", error) from error
        try:
            await self.core.put(self.target, piece.offset, data)
        except OSError as error:
            raise PieceFailedError("write", error) from error

    async def _store_compressed(self, target: BlockIO, offset: int, data: Buffer) -> None:
        assert isinstance(target, Node)
        await target.write_compressed(offset, data)

    def _adapt(self, length: int, seconds: float, worked: float) -> None:
        served = guest_is_served(self.graph)
        if not served and worked:
            # Not what it waited for a worker: who has small pieces would wait as often for those of
            # other jobs, and get less and less of the workers.
            seconds = worked
        if served and not self._served:  # what took long alone is too much now
            self._copy_chunk = min(self._copy_chunk, FIRST_CHUNK)
        self._served = served
        # Beside other jobs a piece waits for theirs, which are larger: it is to be worth that.
        crowding = min(self.scheduler.crowding(self), MOST_CROWDING)
        soon = SOON if served else SOON_ALONE * crowding
        if seconds < soon and length >= self._copy_chunk:
            self._copy_chunk = min(self._most_chunk, self._copy_chunk * 2)
        elif seconds > 4 * soon:
            self._copy_chunk = min(self._most_chunk, max(MIB, self._copy_chunk // 2))

    # -- the end

    async def prepare(self) -> None:
        """All that was copied is durable."""
        if self.core.broken is not None:
            raise self.core.broken
        assert self.user is not None
        await self.user.run(self.target.flush)

    async def commit(self) -> None:
        """The bitmap may now say what was written since."""
        self._succeeded = True

    async def clean(self) -> None:
        """Take the filter out and give the bitmap back, whichever way it ended."""
        async with self.lock_to_undo(self.graph, self.source, self.target):
            await self.release()
            # Who hears of the end may open the target, or delete the nodes, before `null`.
            await self.held.unblock()

    async def release(self) -> None:
        """Give back what the work needed; what was not taken is left out. Holds the graph lock."""
        if self.user is not None:
            await self.graph.detach(self.user)
            self.user = None
        if self.filter is not None:
            self._let_target_go()
            await surgery.remove_filter(self.graph, self.filter)
            self.filter = None
        await self.core.idle()
        if self.bitmap is not None:
            self._thaw(self.bitmap)
            self.bitmap = None

    def _let_target_go(self) -> None:
        """Who reads the target beyond the end of the backup reads the disk, where it is backed."""
        readers = [e for e in self.target.parents if e.parent is not self.filter]
        if any(edge.used & Permission.CONSISTENT_READ for edge in readers):
            for edge in chain.edges_between(self.target, self.source):
                edge.outlived = True

    def _thaw(self, bitmap: DirtyBitmap) -> None:
        mode = self.parameters.bitmap_mode
        if mode is BitmapSyncMode.ALWAYS and self.core.broken is None:
            # Also of a backup that failed counts what it has copied.
            bitmap.thaw(keep=False, undone=self.core.todo)
        else:
            bitmap.thaw(keep=not (self._succeeded and mode is BitmapSyncMode.ON_SUCCESS))
