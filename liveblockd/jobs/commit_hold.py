"""What a commit keeps of the graph while it runs: links, nodes, and its way into the base.

Specification: the permissions of QEMU's commit jobs. Runs on the event loop; the graph lock is held
by the caller of everything here.

Invariants: guests read through the filter above ``top`` only, which needs nothing of the layers
below by itself; who would read a layer in between is refused, as is anybody else who writes to
the base. ``let_go`` and ``unblock`` give back what was taken, also a part of it; twice is harmless.

Errors: BlockError in QEMU's words when other users are in the way.
"""

from __future__ import annotations

from liveblockd.graph import chain, surgery
from liveblockd.graph.filter import JobFilter
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Edge, Node
from liveblockd.jobs.held_nodes import HeldNodes
from liveblockd.jobs.made_writable import MadeWritable
from liveblockd.jobs.user import JobUser
from liveblockd.storage.driver import Permission

BLOCKER = "block device is in use by block job: commit"

_READ = Permission.CONSISTENT_READ


def nodes_between(top: Node, base: Node) -> list[Node]:
    """All nodes from ``top`` down to ``base``, filters too."""
    return [top, *(edge.child for edge in chain.edges_between(top, base))]


class CommitHold(HeldNodes):
    """Of the job ``job_id``, which commits ``top`` into ``base``."""

    def __init__(self, graph: Graph, job_id: str, top: Node, base: Node) -> None:
        super().__init__(graph, BLOCKER)
        self.top = top
        self.base = base
        self.filter: Node | None = None
        #: for messages
        self.name = f"commit job '{job_id}'"
        self.base_open = MadeWritable(graph, base, self.name)
        self._frozen: list[Edge] = []
        self._committed: list[Edge] = []
        self._users: list[JobUser] = []

    async def cover(
        self, name: str | None, kind: type[JobFilter], *, read_only: bool | None = None
    ) -> Node:
        """Put the filter above the top."""
        self.filter = await surgery.insert_filter(
            self.graph, self.top, name, kind=kind, read_only=read_only
        )
        return self.filter

    async def take_links(self) -> None:
        """Freeze the links from top to base, and let writes into the base through them.

        An overlay of the base that nobody reads, as an earlier job may have left over, is in
        nobody's way either; whoever wants to read it is, from now on.
        """
        assert self.filter is not None
        self._frozen = chain.freeze(self.top, self.base)
        unread = [
            edge
            for edge in self.base.parents
            if isinstance(edge.parent, Node) and not edge.used & _READ and edge not in self._frozen
        ]
        self._committed = [*self._frozen, *unread]
        chain.commit_through(self._committed, True)
        overlays = [edge.parent for edge in unread if isinstance(edge.parent, Node)]
        await self.graph.refresh_permissions(self.filter, *overlays)

    async def stand(
        self, node: Node, used: Permission, shared: Permission, role: str = "root"
    ) -> JobUser:
        """Use ``node``, and keep others from working on it."""
        user = await JobUser.attach(
            self.graph,
            node,
            used,
            shared,
            role=role,
            user=None if role == "root" else self.name,
        )
        self._users.append(user)
        self.block(node)
        return user

    async def stand_between(self, node: Node) -> JobUser:
        """Use a node above the base that nobody may read by itself; filters of the base may be."""
        shared = Permission.WRITE | Permission.WRITE_UNCHANGED
        if chain.skip_filters(node) is chain.skip_filters(self.base):
            shared |= _READ | Permission.RESIZE
        return await self.stand(node, Permission.NONE, shared, "intermediate node")

    async def stand_on_base(self) -> JobUser:
        """Write to the base, and grow it if it is smaller than the top."""
        used = _READ | Permission.WRITE
        if self.base.length < self.top.length:
            used |= Permission.RESIZE
        return await self.stand(self.base, used, _READ | Permission.WRITE_UNCHANGED)

    async def let_go(self, *, switched: bool = False) -> None:
        """End all use of the nodes and free the links.

        ``switched``: guests write to the base from now on. What was above it is worth nothing any
        more: its links stay open to writes, as long as nobody reads through them.
        """
        users, self._users = self._users, []
        for user in users:
            await self.graph.detach(user)
        chain.unfreeze(self._frozen)
        committed, self._committed = self._committed, []
        if committed and not switched:
            chain.commit_through(committed, False)
            nodes = self.graph.nodes  # some may have been closed meanwhile
            parents = [e.parent for e in committed if nodes.get(e.parent.name) is e.parent]
            await self.graph.refresh_permissions(*(p for p in parents if isinstance(p, Node)))

    async def uncover(self) -> None:
        """Take the filter out."""
        if self.filter is not None:
            await surgery.remove_filter(self.graph, self.filter)
            self.filter = None
