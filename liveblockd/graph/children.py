"""Children of a node that come and go while it is used (x-blockdev-change).

Specification: qapi/block-core.json, x-blockdev-change. QEMU and this project have one driver that
takes it: ``quorum``.

Runs on the event loop, under the graph's lock, with the parent drained. Invariant: on an error all
is as it was. Errors: BlockError in QEMU's words.
"""

from __future__ import annotations

from liveblockd.errors import BlockError
from liveblockd.graph import surgery
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Edge, Node
from liveblockd.storage.filters.quorum import Quorum


async def add_child(graph: Graph, parent: Node, child: Node) -> None:
    """One more child, of which nobody makes use yet."""
    async with graph.lock:
        driver = parent.driver
        if not isinstance(driver, Quorum):
            raise BlockError(f"The node {parent.name} does not support adding a child", errno=95)
        if child.parents:
            raise BlockError(f"The node {child.name} already has a parent", errno=22)
        surgery.check_link(parent, child, "quorum")
        async with graph.drained(parent, child):
            edge = Edge(parent, driver.new_child_role(child), child)
            graph.connect(edge)
            try:
                await graph.refresh_permissions(parent)
            except BaseException:
                graph.disconnect(edge)
                await graph.refresh_permissions(parent, child)
                raise


async def remove_child(graph: Graph, parent: Node, role: str) -> None:
    """One child less; its node goes if nobody else wants it."""
    async with graph.lock:
        edge = parent.children.get(role)
        if edge is None:
            raise BlockError(f"Node '{parent.name}' does not have child '{role}'")
        driver = parent.driver
        if not isinstance(driver, Quorum):
            raise BlockError(f"The node {parent.name} does not support removing a child", errno=95)
        edge.check_not_frozen()
        async with graph.drained(parent):
            driver.check_remove_child(role)
            child = edge.child
            graph.disconnect(edge)
            await graph.refresh_permissions(parent, child)
        await graph.unref(child)
