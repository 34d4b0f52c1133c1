"""The nodes that a job keeps, and keeps others from working on.

Specification: QEMU's operation blockers. Runs on the event loop. Invariants: a node that is held is
there until ``unblock``, and refuses operations with the reason; ``unblock`` gives back all that was
taken, twice is harmless. Errors: none.
"""

from __future__ import annotations

from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node


class HeldNodes:
    """Held for ``reason``: ``block device is in use by block job: stream`` and the like."""

    def __init__(self, graph: Graph, reason: str) -> None:
        self.graph = graph
        self._reason = reason
        self._nodes: list[Node] = []

    def __contains__(self, node: Node) -> bool:
        return node in self._nodes

    def block(self, node: Node) -> None:
        """Keep ``node`` and let nobody else work on it."""
        node.op_blockers.append(self._reason)
        self._nodes.append(node)

    async def unblock(self) -> None:
        """Undo all ``block``; what nobody uses any more is closed. The graph lock is held."""
        nodes, self._nodes = self._nodes, []
        for node in nodes:
            node.op_blockers.remove(self._reason)
        for node in nodes:
            await self.graph.unref(node)
