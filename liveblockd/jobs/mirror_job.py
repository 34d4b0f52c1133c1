"""blockdev-mirror and drive-mirror: a disk moves to another image while the guest goes on.

Specification: qapi/block-core.json (blockdev-mirror, drive-mirror). Runs on the event loop.

What a ``MirrorCore`` copies, and how it ends: the users of the source go on with the target, and
the target gets the backing chain that it needs for that. Errors: those of ``MirrorCore``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import ClassVar

from liveblockd.errors import BlockError
from liveblockd.graph import chain, surgery
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Edge, Node, Operation
from liveblockd.jobs.held_nodes import HeldNodes
from liveblockd.jobs.job import JobType
from liveblockd.jobs.mirror import MirrorCore
from liveblockd.jobs.mirror_options import MirrorOptions
from liveblockd.storage.driver import Permission
from liveblockd.storage.filters.quorum import Quorum

BLOCKER = "block device is in use by block job: mirror"


class MirrorSyncMode(enum.StrEnum):
    """What of the source is copied (qapi/block-core.json)."""

    TOP = "top"
    FULL = "full"
    NONE = "none"
    INCREMENTAL = "incremental"
    BITMAP = "bitmap"


@dataclass(frozen=True, slots=True)
class MirrorParameters:
    """What the client asked for, as it can be written down and read again."""

    job_id: str
    device: str
    target: str
    sync: MirrorSyncMode
    replaces: str | None = None
    filter_node_name: str | None = None
    target_is_zero: bool = False
    granularity: int | None = None
    buf_size: int | None = None
    #: ``granularity`` and ``buf_size`` are those above
    options: MirrorOptions = field(default_factory=MirrorOptions)


class Mirror(MirrorCore):
    """Made by ``mirror_start``."""

    type: ClassVar[JobType] = JobType.MIRROR

    def __init__(
        self,
        parameters: MirrorParameters,
        options: MirrorOptions,
        graph: Graph,
        source: Node,
        target: Node,
        *,
        base: Node | None,
        nothing_yet: bool,
    ) -> None:
        super().__init__(
            parameters.job_id,
            options,
            graph,
            source,
            target,
            base=base,
            nothing_yet=nothing_yet,
            target_is_zero=parameters.target_is_zero,
            unit=_unit(target),
        )
        self.parameters = parameters
        self.replaced: Node = source
        #: what is put below the target at the end; () leaves it alone
        self.new_backing: tuple[Node | None, ...] = ()
        # Given back by ``free``.
        self.held = HeldNodes(graph, BLOCKER)

    def let_go(self) -> None:
        """Nor do copies wait for a target whose server is gone."""
        super().let_go()
        self.graph.stop_waiting(self.target)

    def cut_off(self, silence: float) -> None:
        """The target is worth nothing, unless guests are about to go on with it."""
        if not self.needed:
            self.graph.cut_off(self.target, silence)

    def check_completion(self) -> None:
        """The node to be replaced is still there and free."""
        name = self.parameters.replaces
        if name is None:
            return
        node = self.graph.find(name)
        if node not in self.held:
            node.check_operation(Operation.CHANGE)
            self.held.block(node)
        self.replaced = node

    async def pivot(self) -> None:
        """All users of the source go on with the target."""
        if not can_replace(self.source, self.replaced):
            raise BlockError(
                f"Can no longer replace '{self.replaced.name}' by '{self.target.name}', because it "
                "can no longer be guaranteed that doing so would not lead to an abrupt change of "
                "visible data",
                errno=1,
            )
        edge = self.target_user.edge
        before = edge.used, edge.shared
        edge.used, edge.shared = Permission.NONE, Permission.ALL
        old = [self.replaced]
        keep = [self.source_user.edge]
        if self.filter is not None:
            keep.append(self.filter.children["file"])
            if self.replaced is self.source:
                old.insert(0, self.filter)
        moved: list[tuple[Edge, Node]] = []
        try:
            moved = await surgery.replace_nodes(self.graph, old, self.target, keep=keep)
            await self.finish_target()
        except BaseException:
            await surgery.put_back(self.graph, moved, self.target)
            edge.used, edge.shared = before
            await self.graph.refresh_permissions(self.target)
            raise

    async def finish_target(self) -> None:
        """Put the target on its backing node; guests stand still, and it is durable."""
        for backing in self.new_backing:
            if self.target.backing is not backing:
                await surgery.replace_backing(self.graph, self.target, backing)

    async def clean(self) -> None:
        """Take the filter out and leave the nodes, whichever way it ended."""
        async with self.lock_to_undo(self.graph, self.source, self.target):
            await self.release()
            # Who hears of the end may open the target, or delete the nodes, before `null`.
            await self.held.unblock()

    async def release(self) -> None:
        """Give back what the work needed; what was not taken is left out. Holds the graph lock."""
        self.untrack()
        self.target.awaits_backing = False
        for user in (self.source_user, self.target_user):
            if user is not None:
                await self.graph.detach(user)
        if self.filter is not None:
            await surgery.remove_filter(self.graph, self.filter)


def can_replace(source: Node, node: Node) -> bool:
    """Whether nobody notices when ``node`` is replaced by one that reads as ``source`` does.

    It is the same disk, or a child of a quorum that reads so, good or bad, and of nothing else.
    """
    layer = chain.skip_filters(source)
    votes = layer is not None and isinstance(layer.driver, Quorum)
    if layer is not None and votes and any(e.child is node for e in layer.children.values()):
        return len(node.parents) == 1
    return chain.skip_filters(node) is layer


def _unit(target: Node) -> int | None:
    """Of a target without the backing node that its header names whole clusters are written.

    What is left over of a cluster would be filled with zeros, and not with what is there later.
    """
    if target.backing is None and target.driver.backing_file:
        return target.driver.cluster_size
    return None


def not_supported(sync: MirrorSyncMode) -> BlockError:
    """What a mirror cannot be asked for."""
    return BlockError(f"Sync mode '{sync}' not supported")
