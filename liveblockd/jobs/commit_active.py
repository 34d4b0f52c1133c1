"""block-commit of the active image: its base is kept in step with it, then guests go on with that.

Specification: qapi/block-core.json (block-commit), QEMU's docs/interop/live-block-operations.
Runs on the event loop; ``MirrorCore`` copies.

Why nothing is lost: until the switch guests use ``top``, whose layers hide all that is written into
the base, whatever part of it has been written. The switch comes when the base has everything, and
has it durably; it changes no header. A cancel leaves the guests on ``top``, which reads as before.

Errors: those of ``MirrorCore``; BlockError when the base cannot be grown.
"""

from __future__ import annotations

from typing import ClassVar

from liveblockd.graph import surgery
from liveblockd.graph.bitmaps import default_granularity
from liveblockd.graph.graph import Graph
from liveblockd.graph.mirror_top import CommitMirrorTop
from liveblockd.graph.node import Node
from liveblockd.jobs.commit import CommitParameters
from liveblockd.jobs.commit_hold import CommitHold, nodes_between
from liveblockd.jobs.job import JobType
from liveblockd.jobs.mirror import MirrorCore
from liveblockd.jobs.mirror_options import MirrorCopyMode, MirrorOptions
from liveblockd.storage.driver import Permission


class CommitActive(MirrorCore):
    """Commits ``top`` and the layers down to above ``base`` into ``base``."""

    type: ClassVar[JobType] = JobType.COMMIT

    def __init__(self, parameters: CommitParameters, graph: Graph, top: Node, base: Node) -> None:
        options = MirrorOptions(
            granularity=default_granularity(base.driver.cluster_size),
            speed=parameters.speed,
            on_source_error=parameters.on_error,
            on_target_error=parameters.on_error,
            auto_finalize=parameters.auto_finalize,
            auto_dismiss=parameters.auto_dismiss,
        )
        super().__init__(parameters.job_id, options, graph, top, base, base=base)
        self.parameters = parameters
        self.hold = CommitHold(graph, parameters.job_id, top, base)
        self.switched = False

    async def cover(self) -> None:
        """Make the base writable and put the filter above the top; ``release`` undoes it."""
        await self.hold.base_open.open()
        self.filter = await self.hold.cover(self.parameters.filter_node_name, CommitMirrorTop)
        self.hold.block(self.filter)

    async def take(self) -> None:
        """Take the rest of what the work needs; ``release`` and ``free`` give it back."""
        hold = self.hold
        await hold.take_links()
        shared = Permission.ALL & ~Permission.RESIZE
        self.source_user = await hold.stand(self.source, Permission.NONE, shared, "source")
        for node in nodes_between(self.source, self.target)[1:-1]:
            await hold.stand_between(node)
        self.target_user = await hold.stand_on_base()
        await self.track()

    async def run(self) -> None:
        """Grow the base, then keep it in step."""
        if self.target.length < self.source.length:
            await self.graph.grow(self.target, self.source.length)
        await super().run()

    def check_sizes(self) -> None:
        """A longer base is as good: it keeps its length."""
        assert self.target.length >= self.source.length

    def complete(self) -> None:
        """Switch over; a guest that writes faster than can be copied does not put it off."""
        super().complete()
        self.change_copy_mode(MirrorCopyMode.WRITE_BLOCKING)

    def end_gently(self) -> None:
        """As above, without a switch."""
        super().end_gently()
        self.change_copy_mode(MirrorCopyMode.WRITE_BLOCKING)

    async def pivot(self) -> None:
        """All users of the top go on with the base."""
        assert self.filter is not None
        if self.source.read_only != self.target.read_only:
            await self._reopen_base(self.source.read_only)
        edge = self.target_user.edge
        before = edge.used, edge.shared
        edge.used, edge.shared = Permission.NONE, Permission.ALL
        keep = [self.source_user.edge, self.filter.children[self.filter.driver_class.filtered]]
        try:
            await surgery.replace_nodes(
                self.graph, [self.filter, self.source], self.target, keep=keep
            )
        except BaseException:
            edge.used, edge.shared = before
            await self.graph.refresh_permissions(self.target)
            raise
        self.switched = True
        self.hold.base_open.keep()

    async def _reopen_base(self, read_only: bool) -> None:
        """A top that nobody may write to leaves a base of that kind."""
        edge = self.target_user.edge
        edge.used &= ~(Permission.WRITE | Permission.RESIZE)
        await self.graph.set_read_only(self.target, read_only)

    async def clean(self) -> None:
        """Take the filter out and leave the nodes, whichever way it ended."""
        async with self.lock_to_undo(self.graph, self.source, self.target):
            self.hold.base_open.leave()
            await self.release()
            await self.hold.unblock()

    async def wind_up(self) -> None:
        """A base that guests did not go over to; of a cancelled job nobody was promised it."""
        await self.hold.base_open.close_left()

    async def release(self) -> None:
        """Give back what the work needed; what was not taken is left out. Holds the lock."""
        self.untrack()
        await self.hold.let_go(switched=self.switched)
        await self.hold.uncover()
        await self.hold.base_open.close()
