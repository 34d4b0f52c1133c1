"""Lets exports onto the nodes of the graph.

Runs on the event loop. Invariant: an export holds the permissions it needs from before its first
request until after its last. Errors: BlockError in QEMU's words.
"""

from __future__ import annotations

from liveblockd.errors import BlockError
from liveblockd.exports.backend import DirtySource, ExportBackend
from liveblockd.graph.backend import Backend
from liveblockd.graph.graph import Graph
from liveblockd.storage.driver import Permission


class GraphBackends:
    """The ``BackendSource`` of the export registry."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    async def attach(self, node_name: str, *, writable: bool) -> Backend:
        """A user of the node."""
        async with self._graph.lock:
            node = self._graph.lookup(None, node_name)
            if writable and node.read_only:
                raise BlockError("Cannot export read-only node as writable")
            used = Permission.CONSISTENT_READ
            if writable:
                used |= Permission.WRITE
            return await self._graph.attach(node, used)

    async def release(self, backend: ExportBackend) -> None:
        """The export is gone."""
        assert isinstance(backend, Backend)
        await self._graph.detach(backend)

    def dirty_bitmap(self, backend: ExportBackend, node: str | None, name: str) -> DirtySource:
        """Dirty bitmaps come with a later version: there is none that could be exported."""
        assert isinstance(backend, Backend)
        where = node if node is not None else backend.node.name
        raise BlockError(f"Bitmap '{name}' is not found on node '{where}'")
