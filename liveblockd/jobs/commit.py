"""block-commit of images below the active one: copy into a base what the layers above it hold.

Specification: qapi/block-core.json (block-commit), QEMU's docs/interop/live-block-operations.
Runs on the event loop; the active image is committed by ``commit_active``.

Why nothing is lost:

* Until the end every overlay refers to ``top``, and what is written into the base is hidden from it
  by the layer that it was copied from: what is read through ``top`` never changes, whatever part of
  the base has been written, torn by a crash or given up.
* ``prepare`` makes the base durable, then the overlays' headers, then changes the graph.
* Whoever reads a layer between top and base by itself would see the base change below it: such
  users are refused, by edges of the job that do not share reading. Nobody else writes to the base.
* A base that is longer than ``top`` is made zeros as far as an overlay reads beyond ``top``.

Errors: those of ``CopyJob``; BlockError and OSError from ``prepare``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

from liveblockd.graph import chain, surgery
from liveblockd.graph.filter import CommitTop
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.jobs.backing_link import backing_format, backing_string
from liveblockd.jobs.chain_parameters import ChainParameters
from liveblockd.jobs.commit_hold import CommitHold, nodes_between
from liveblockd.jobs.copying import READ_CHUNK, CopyJob, PieceFailedError
from liveblockd.jobs.job import JobType
from liveblockd.jobs.pieces import Run, split
from liveblockd.jobs.planning import copyable, plan_stretch
from liveblockd.jobs.user import JobUser
from liveblockd.storage.driver import BlockDriver, ExtentKind, Permission
from liveblockd.storage.options import BlockdevDetectZeroesOptions


@dataclass(frozen=True, slots=True)
class CommitParameters(ChainParameters):
    """block-commit: ``top`` (a file name) or ``top_node``, without both the active image."""

    top: str | None = None
    top_node: str | None = None


class Commit(CopyJob):
    """Commits the layers from ``top`` down to above ``base`` into ``base``.

    ``device`` is the active image. Both ``top`` and ``base`` may be filters above their layers.
    """

    type: ClassVar[JobType] = JobType.COMMIT
    tries_again: ClassVar[bool] = True

    def __init__(
        self, parameters: CommitParameters, graph: Graph, device: Node, top: Node, base: Node
    ) -> None:
        super().__init__(
            parameters.job_id,
            speed=parameters.speed,
            on_error=parameters.on_error,
            auto_finalize=parameters.auto_finalize,
            auto_dismiss=parameters.auto_dismiss,
        )
        self.parameters = parameters
        self.graph = graph
        self.device = device
        self.top = top
        self.base = base
        layer = chain.skip_filters(base)
        assert layer is not None
        self.granularity = max(layer.driver.cluster_size or 1, layer.driver.request_alignment)
        self.length = top.length
        self.hold = CommitHold(graph, parameters.job_id, top, base)
        #: who reads and is counted, and who writes
        self.reader: JobUser | None = None
        self.writer: JobUser | None = None

    async def take(self) -> None:
        """Take what the work needs; ``release`` and ``free`` give it back, also a part of it."""
        hold = self.hold
        await hold.stand(self.device, Permission.NONE, Permission.ALL, "main node")
        await hold.base_open.open()
        await hold.cover(self.parameters.filter_node_name, CommitTop, read_only=True)
        await hold.take_links()
        for node in nodes_between(self.top, self.base)[:-1]:
            await hold.stand_between(node)
        self.reader = await hold.stand(self.top, Permission.NONE, Permission.ALL)
        self.writer = await hold.stand_on_base()

    def nothing_held(self) -> AbstractContextManager[None]:
        """Of all that it reads, and of the base."""
        return self.graph.nothing_held(self.top)

    def images(self) -> tuple[list[Node], Node | None]:
        """From the top to the last one to go; the base."""
        base = chain.skip_filters(self.base)
        return chain.layers_between(self.top, base), base

    # -- the work

    async def run(self) -> None:
        """Grow the base, then copy."""
        if self.base.length < self.top.length:
            await self.graph.grow(self.base, self.top.length)
        await super().run()

    async def plan(self, offset: int) -> tuple[list[Run], int]:
        """Pieces for the next stretch of the disk."""
        assert self.reader is not None
        stretch = (offset, self.length)
        with self.reading():
            return await self.reader.run(
                lambda: plan_stretch(
                    self.top, self.base, stretch, self.granularity, lambda found: found.kind
                )
            )

    async def move(self, piece: Run) -> None:
        """Write one piece into the base."""
        assert self.reader is not None
        await self.reader.run(lambda: self._move(piece))

    async def _move(self, piece: Run) -> None:
        assert self.writer is not None
        if piece.kind is ExtentKind.ZERO:
            try:
                await self.writer.store_zeroes(piece.offset, piece.length, may_unmap=True)
            except OSError as error:
                raise PieceFailedError("write", error) from error
            return
        if piece.kind is ExtentKind.DATA and await self._copy(piece):
            return
        for part in split(piece, max(READ_CHUNK // self.granularity, 1) * self.granularity):
            await self._read_and_store(part)

    async def _copy(self, piece: Run) -> bool:
        """Let a worker copy what the base has nothing of yet; whether that was done.

        Nobody else writes to the base, so that it has nothing there until this is over.
        """
        base, driver = self.base, self.base.driver
        source = copyable(piece)
        if (
            source is None
            or base.is_filter
            or base.write_threshold
            or type(driver).populate_from is BlockDriver.populate_from
            or base.detect_zeroes is not BlockdevDetectZeroesOptions.OFF
        ):
            return False
        try:
            held = await driver.map(piece.offset, piece.length)
            if held[0].kind is not ExtentKind.UNALLOCATED or held[0].length < piece.length:
                return False
            await driver.populate_from(piece.offset, piece.length, source, piece.host_offset)
        except OSError:
            return False  # reading and writing it by turns tells which side failed
        base.record(piece.offset, piece.length)
        return True

    async def _read_and_store(self, piece: Run) -> None:
        assert self.writer is not None
        there = max(0, min(piece.length, self.top.length - piece.offset))
        try:
            with self.reading():
                data = await self.top.read(piece.offset, there) if there else b""
        except OSError as error:
            raise PieceFailedError("read", error) from error
        if there < piece.length:
            data = bytes(data) + bytes(piece.length - there)
        try:
            await self.writer.store(piece.offset, data)
        except OSError as error:
            raise PieceFailedError("write", error) from error

    # -- the end

    async def prepare(self) -> None:
        """Make the base durable, then the headers that lead to it, and then change the graph."""
        # It may take long: whoever changes another disk, or ends a job, does not wait for it.
        await self.base.flush()
        async with self.graph.lock:
            assert self.hold.filter is not None
            await self._hide_end()
            await self.base.flush()
            for overlay in chain.overlays(self.hold.filter):
                await self._link(overlay)
            await self.hold.let_go()
            await surgery.drop_intermediate(self.graph, self.hold.filter, self.base)
            self.hold.filter = None

    async def _hide_end(self) -> None:
        """Make zeros of what the base has beyond ``top``, where a longer overlay would show it.

        It reads as zeros there now, and has to afterwards.
        """
        assert self.hold.filter is not None
        assert self.writer is not None
        start = self.top.length
        longest = max((overlay.length for overlay in chain.overlays(self.hold.filter)), default=0)
        end = min(longest, self.base.length)
        if end > start:
            await self.writer.write_zeroes(start, end - start, may_unmap=True)

    async def _link(self, overlay: Node) -> None:
        """Let the header of ``overlay`` name the base, durably."""
        parameters = self.parameters
        written = parameters.backing_file
        if written is None:
            written = backing_string(overlay, self.base)
        name = backing_format(self.base, mask_protocol=parameters.backing_mask_protocol)
        was_read_only = overlay.read_only
        if was_read_only:
            await self.graph.set_read_only(overlay, False)
        try:
            await overlay.driver.change_backing_file(written, name)
        finally:
            if was_read_only:
                await self.graph.set_read_only(overlay, True)

    async def clean(self) -> None:
        """Give back what the work needed, whichever way it ended."""
        async with self.lock_to_undo(self.graph, self.base):
            if self.error is not None:  # else the base has nothing to flush
                self.hold.base_open.leave()
            await self.release()

    async def wind_up(self) -> None:
        """Nobody was promised anything of a base that did not get everything."""
        await self.hold.base_open.close_left()

    async def release(self) -> None:
        """Give back what the work needed; what was not taken is left out. Holds the lock."""
        self.reader = self.writer = None
        await self.hold.let_go()
        await self.hold.uncover()
        await self.hold.base_open.close()

    async def free(self) -> None:
        """Let go of the nodes."""
        async with self.graph.lock:
            await self.hold.unblock()
