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

from dataclasses import dataclass
from typing import ClassVar

from liveblockd.graph import chain, surgery
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Edge, Node
from liveblockd.jobs.backing_link import backing_format, backing_string
from liveblockd.jobs.copying import READ_CHUNK, CopyJob, PieceFailedError
from liveblockd.jobs.job import BlockdevOnError, JobType
from liveblockd.jobs.pieces import Run, split
from liveblockd.jobs.planning import plan_stretch
from liveblockd.jobs.user import JobUser
from liveblockd.storage.driver import ExtentKind

BLOCKER = "block device is in use by block job: commit"


@dataclass(frozen=True, slots=True)
class CommitParameters:
    """What the client asked for, as it can be written down and read again; bytes per second."""

    job_id: str
    device: str
    base: str | None = None
    base_node: str | None = None
    top: str | None = None
    top_node: str | None = None
    backing_file: str | None = None
    backing_mask_protocol: bool = False
    speed: int = 0
    on_error: BlockdevOnError = BlockdevOnError.REPORT
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True


class Commit(CopyJob):
    """Commits the layers from ``top`` down to above ``base`` into ``base``.

    ``device`` is the active image. Both ``top`` and ``base`` may be filters above their layers.
    """

    type: ClassVar[JobType] = JobType.COMMIT

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
        # Given back by ``clean``.
        self.filter: Node | None = None
        self.frozen: list[Edge] = []
        self.committed: list[Edge] = []
        self.made_writable = False
        self.users: list[JobUser] = []
        #: of ``users``: who reads and is counted, and who writes
        self.reader: JobUser | None = None
        self.writer: JobUser | None = None
        # Given back by ``free``.
        self.blocked: list[Node] = []

    # -- the work

    async def run(self) -> None:
        """Grow the base, then copy."""
        if self.base.length < self.top.length:
            await self.graph.grow(self.base, self.top.length)
        await super().run()

    async def plan(self, offset: int) -> tuple[list[Run], int]:
        """Pieces for the next stretch of the disk."""
        assert self.reader is not None
        return await self.reader.run(
            lambda: plan_stretch(
                self.top,
                self.base,
                (offset, self.length),
                self.granularity,
                lambda found: found.kind,
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
        for part in split(piece, max(READ_CHUNK // self.granularity, 1) * self.granularity):
            await self._read_and_store(part)

    async def _read_and_store(self, piece: Run) -> None:
        assert self.writer is not None
        there = max(0, min(piece.length, self.top.length - piece.offset))
        try:
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
        async with self.graph.lock:
            assert self.filter is not None
            await self._hide_end()
            await self.base.flush()
            for overlay in chain.overlays(self.filter):
                await self._link(overlay)
            await self._let_go()
            await surgery.drop_intermediate(self.graph, self.filter, self.base)
            self.filter = None

    async def _hide_end(self) -> None:
        """Make zeros of what the base has beyond ``top``, where a longer overlay would show it.

        It reads as zeros there now, and has to afterwards.
        """
        assert self.filter is not None
        assert self.writer is not None
        start = self.top.length
        longest = max((overlay.length for overlay in chain.overlays(self.filter)), default=0)
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

    async def _let_go(self) -> None:
        """End all use of the nodes and free the links; twice is harmless. Holds the lock."""
        users, self.users = self.users, []
        self.reader = self.writer = None
        for user in users:
            await self.graph.detach(user)
        chain.unfreeze(self.frozen)
        if self.committed:
            chain.commit_through(self.committed, False)
            self.committed.clear()
            await self.graph.refresh_permissions(self.top)

    async def clean(self) -> None:
        """Give back what the work needed, whichever way it ended."""
        async with self.graph.lock:
            await self.release()

    async def release(self) -> None:
        """Give back what the work needed; what was not taken is left out. Holds the lock."""
        await self._let_go()
        if self.filter is not None:
            await surgery.remove_filter(self.graph, self.filter)
            self.filter = None
        if self.made_writable:
            self.made_writable = False
            await self.graph.set_read_only(self.base, True)

    async def free(self) -> None:
        """Let go of the nodes; those that nobody uses any more are closed."""
        async with self.graph.lock:
            await self.unblock()

    def block(self, node: Node) -> None:
        """Keep ``node`` and let nobody else work on it."""
        node.op_blockers.append(BLOCKER)
        self.blocked.append(node)

    async def unblock(self) -> None:
        """Undo all ``block``; holds the graph lock."""
        blocked, self.blocked = self.blocked, []
        for node in blocked:
            node.op_blockers.remove(BLOCKER)
        for node in blocked:
            await self.graph.unref(node)
