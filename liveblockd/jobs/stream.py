"""block-stream: copy into an image what its backing chain holds above a base, then drop the rest.

Specification: qapi/block-core.json (block-stream), QEMU's docs/interop/live-block-operations.
Runs on the event loop; the copies are made by workers (``driver.populate_from``).

Why nothing is lost:

* What is copied goes *below* the guest's writes (``driver.populate``): a guest write wins, whenever
  it comes, and waits for nothing.
* The intermediate images cannot change: their links are frozen, the nodes blocked.
* Internal snapshots of the image lose what they had from the images that go, as in QEMU; a warning
  says so when the job begins (``docs/durability.md``).
* ``prepare`` drops the intermediate images from the header only after all that was copied is
  durable, and from the graph only after the header is. Before that a crash, an error or a cancel
  leaves the old chain, which reads the same with or without the copied clusters.

Errors: those of ``CopyJob``; BlockError and OSError from ``prepare``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from errno import ENOTSUP
from typing import ClassVar

from liveblockd.errors import BlockError
from liveblockd.graph import chain, surgery
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Edge, Node
from liveblockd.jobs.backing_link import backing_format, backing_string
from liveblockd.jobs.chain_parameters import ChainParameters
from liveblockd.jobs.copying import READ_CHUNK, CopyJob, PieceFailedError
from liveblockd.jobs.held_nodes import HeldNodes
from liveblockd.jobs.job import JobType
from liveblockd.jobs.made_writable import MadeWritable
from liveblockd.jobs.pieces import Run, split
from liveblockd.jobs.planning import copyable, copyables, plan_stretch, survey_stretch
from liveblockd.jobs.user import JobUser
from liveblockd.storage.driver import ExtentKind, Source

BLOCKER = "block device is in use by block job: stream"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StreamParameters(ChainParameters):
    """block-stream: down to ``base``, or to ``bottom`` and with it."""

    bottom: str | None = None


class Stream(CopyJob):
    """Streams into ``top`` the layers below it down to ``bottom``, which is the last one to go.

    What lies below ``bottom`` is the base; it is looked up when it is needed, since another job may
    put something else there. ``bottom is top`` means that there is nothing to copy.
    """

    type: ClassVar[JobType] = JobType.STREAM
    plans_ahead: ClassVar[bool] = True

    def __init__(self, parameters: StreamParameters, graph: Graph, top: Node, bottom: Node) -> None:
        super().__init__(
            parameters.job_id,
            speed=parameters.speed,
            on_error=parameters.on_error,
            auto_finalize=parameters.auto_finalize,
            auto_dismiss=parameters.auto_dismiss,
        )
        self.parameters = parameters
        self.graph = graph
        self.top = top
        self.bottom = bottom
        #: the node that was named as the base: filters above it go as well
        self.stop: Node | None = None
        self.immediate = bottom is top
        self.length = 0 if self.immediate else top.length
        self.granularity = top.driver.cluster_size or 1
        # Given back by ``clean``.
        self.frozen: list[Edge] = []
        self.filter: Node | None = None
        self.top_open = MadeWritable(graph, top, f"stream job '{parameters.job_id}'")
        self.user: JobUser | None = None
        # Given back by ``free``.
        self.held = HeldNodes(graph, BLOCKER)

    @property
    def base(self) -> Node | None:
        """The layer that stays below ``top``; None: none does."""
        return chain.layer_below(self.bottom)

    def nothing_held(self) -> AbstractContextManager[None]:
        """Of all that it reads."""
        return self.graph.nothing_held(self.top)

    def images(self) -> tuple[list[Node], Node | None]:
        """From the top to the last one to go; the base."""
        return chain.layers_between(self.top, self.base), self.base

    # -- the work

    async def plan(self, offset: int) -> tuple[list[Run], int]:
        """Pieces for the next stretch of the disk, as far as ``LOOK_AHEAD`` runs go."""
        assert self.user is not None
        with self.reading():
            return await self.user.run(lambda: self._plan(offset))

    async def _plan(self, offset: int) -> tuple[list[Run], int]:
        base = self.base

        def kind_of(found: chain.Run) -> ExtentKind:
            if found.layer is self.top or (found.kind is ExtentKind.ZERO and base is None):
                # The top has it already, or it will read as zeros with nothing below.
                return ExtentKind.UNALLOCATED
            return found.kind

        stretch = (offset, self.length)
        if not self.top.driver.gathers:
            return await plan_stretch(self.top, base, stretch, self.granularity, kind_of)
        demand = self.graph.environment.workers.demand
        plan = await survey_stretch(
            self.top, base, stretch, self.granularity, kind_of, demand, first=not offset
        )
        if plan is not None:
            return plan
        return await plan_stretch(self.top, base, stretch, self.granularity, kind_of, least_copy=0)

    async def move(self, piece: Run) -> None:
        """Copy one piece; the driver leaves alone what the guest has written meanwhile."""
        assert self.user is not None
        await self.user.run(lambda: self._move(piece))

    def gathers(self, pieces: Sequence[Run]) -> int:
        """Pieces that a worker can copy, where the driver takes many at a time."""
        if not self.top.driver.gathers:
            return 0
        file_of = copyables()
        for number, piece in enumerate(pieces):
            if piece.kind is not ExtentKind.DATA or file_of(piece) is None:
                return number
        return len(pieces)

    async def move_together(self, pieces: list[Run]) -> None:
        """Copy several pieces from wherever they are."""
        assert self.user is not None
        await self.user.run(lambda: self._move_together(pieces))

    async def _move_together(self, pieces: list[Run]) -> None:
        sources = []
        file_of = copyables()
        for piece in pieces:
            file = file_of(piece)
            if file is None:  # the graph has changed
                raise OSError(ENOTSUP, os.strerror(ENOTSUP))
            sources.append(Source(piece.offset, piece.length, file, piece.host_offset))
        await self.top.driver.populate_many(sources)

    async def _move(self, piece: Run) -> None:
        driver = self.top.driver
        if piece.kind is ExtentKind.ZERO:
            try:
                await driver.populate_zeroes(piece.offset, piece.length)
            except OSError as error:
                raise PieceFailedError("write", error) from error
            return
        if piece.kind is ExtentKind.DATA and (source := copyable(piece)) is not None:
            try:
                await driver.populate_from(piece.offset, piece.length, source, piece.host_offset)
            except OSError:
                # Which side failed? Reading and writing it by turns tells, or gets around it.
                pass
            else:
                return
        if piece.kind is ExtentKind.COMPRESSED and piece.layer is not None:
            try:
                packed = await piece.layer.driver.packed(piece.offset, piece.length)
                if packed is not None:
                    await driver.populate_packed(piece.offset, piece.length, packed)
                    return
            except OSError:
                pass  # as above
        for part in split(piece, max(READ_CHUNK // self.granularity, 1) * self.granularity):
            await self._read_and_populate(part)

    async def _read_and_populate(self, piece: Run) -> None:
        source = self.top.backing
        assert source is not None
        # An intermediate image that is shorter than the top reads as zeros past its end.
        there = max(0, min(piece.length, source.length - piece.offset))
        try:
            with self.reading():
                data = await source.read(piece.offset, there) if there else b""
        except OSError as error:
            raise PieceFailedError("read", error) from error
        if there < piece.length:
            data = bytes(data) + bytes(piece.length - there)
        try:
            await self.top.driver.populate(piece.offset, data)
        except OSError as error:
            raise PieceFailedError("write", error) from error

    def warn_of_snapshots(self) -> None:
        """Say it if internal snapshots will read zeros where they rely on what goes."""
        with suppress(BlockError):  # no such thing in this format
            if names := [snapshot.name for snapshot in self.top.driver.list_snapshots()]:
                log.warning(
                    "stream '%s': the internal snapshots of node '%s' (%s) lose what they have "
                    "from the backing images that it drops",
                    self.id, self.top.name, ", ".join(names),
                )  # fmt: skip

    # -- the end

    async def prepare(self) -> None:
        """Rewrite the header, durably, and then the graph."""
        if not self.immediate:
            # It may take long: whoever changes another disk, or ends a job, does not wait for it.
            await self.top.driver.flush()
        async with self.graph.lock:
            if self.immediate:
                await self._finish_at_once()
                return
            driver = self.top.driver
            base = self.base
            if base is None:
                await driver.change_backing_file(None, None)
            else:
                await driver.change_backing_file(self._backing_string(base), self._format(base))
            chain.unfreeze(self.frozen)
            await surgery.replace_backing(self.graph, self.top, self._new_backing())

    def _new_backing(self) -> Node | None:
        """What is to be below ``top``: the base, with the filters above it that nobody left out.

        One of another job stays in any case.
        """
        backing = self.bottom.backing
        node = backing
        while node is not None and node is not self.stop and node.is_filter and not node.job_filter:
            node = node.file
        # Another job may have taken the base away, and put something else there.
        return node if node is self.stop else backing

    async def _finish_at_once(self) -> None:
        """Nothing was copied, but filters may go, or another name may have been asked for."""
        base, backing = self.base, self._new_backing()
        unchanged = backing is self.top.backing and self.parameters.backing_file is None
        if base is None or unchanged:
            return
        written = self._backing_string(base)
        await self.top.driver.change_backing_file(written, self._format(base))
        await surgery.replace_backing(self.graph, self.top, backing)

    def _backing_string(self, base: Node) -> str:
        asked = self.parameters.backing_file
        return backing_string(self.top, base) if asked is None else asked

    def _format(self, base: Node) -> str:
        return backing_format(base, mask_protocol=self.parameters.backing_mask_protocol)

    async def clean(self) -> None:
        """Take the filter out and let go of the links, whichever way it ended."""
        async with self.lock_to_undo(self.graph, self.top):
            if self.error is not None:  # else there is nothing to flush
                self.top_open.leave()
            await self.release()

    async def wind_up(self) -> None:
        """Nobody was promised anything of a top that did not get everything."""
        await self.top_open.close_left()

    async def release(self) -> None:
        """Give back what the work needed; what was not taken is left out. Holds the graph lock."""
        chain.unfreeze(self.frozen)
        if self.user is not None:
            await self.graph.detach(self.user)
            self.user = None
        if self.filter is not None:
            await surgery.remove_filter(self.graph, self.filter)
            self.filter = None
        await self.top_open.close()

    async def free(self) -> None:
        """Let go of the nodes; those that nobody uses any more are closed."""
        async with self.graph.lock:
            await self.held.unblock()
