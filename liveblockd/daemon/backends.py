"""Lets exports onto the nodes of the graph.

Runs on the event loop. Invariants: an export holds the permissions it needs from before its first
request until after its last; a dirty bitmap that is exported is busy, so that nobody changes it but
the writes that it records. Errors: BlockError in QEMU's words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import ENOENT
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.exports.backend import DirtySource, ExportBackend
from liveblockd.graph import dirty, drive_limits
from liveblockd.graph.activation import activate
from liveblockd.graph.backend import Backend
from liveblockd.graph.bitmaps import DirtyBitmap
from liveblockd.graph.graph import Graph
from liveblockd.graph.mirror_top import where_guests_are
from liveblockd.graph.node import Node
from liveblockd.storage.driver import Permission

#: extents of a dirty bitmap in one answer
MAX_EXTENTS: Final = 16384


class GraphBackends:
    """The ``BackendSource`` of the export registry."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        #: in use by an export
        self._bitmaps: dict[Backend, list[DirtyBitmap]] = {}

    async def attach(
        self, node_name: str, *, writable: bool, allow_inactive: bool = False
    ) -> Backend:
        """A user of the node, which is active then unless the export ``allow_inactive``."""
        async with self._graph.lock:
            node = self._graph.lookup(None, node_name)
            if writable and node.read_only and not node.fell_back:
                raise BlockError("Cannot export read-only node as writable")
            used = Permission.CONSISTENT_READ
            if writable:
                used |= Permission.WRITE
            if not allow_inactive:
                await activate(self._graph, node)
            # A disk whose image on top is being committed has guests all the same: those of a
            # daemon that has resumed the commit come after it.
            guests = where_guests_are(node)
            backend = await self._graph.attach(guests, used, allow_inactive=allow_inactive)
            drive_limits.take_guest(self._graph, backend)
            return backend

    @contextmanager
    def unhindered(self, backend: ExportBackend) -> Iterator[None]:
        """Neither the limits of its drive nor a driver below hold up a request meanwhile."""
        assert isinstance(backend, Backend)
        backend.guest_of = None
        backend.join(None)
        with self._graph.nothing_held(backend.node):
            yield

    async def release(self, backend: ExportBackend) -> None:
        """The export is gone."""
        assert isinstance(backend, Backend)
        for bitmap in self._bitmaps.pop(backend, ()):
            bitmap.busy = False
        await self._graph.detach(backend)

    def dirty_bitmap(self, backend: ExportBackend, node: str | None, name: str) -> DirtySource:
        """The bitmap, busy until ``release``; without ``node`` the first of that name there is."""
        assert isinstance(backend, Backend)
        if node is not None:  # one of another node says what changed there
            _, bitmap = dirty.find(self._graph, node, name)
            changing = False
        else:
            owner, bitmap = _in_chain(backend.node, name)
            changing = bitmap.enabled and not owner.read_only
        bitmap.check()
        if changing and backend.read_only:
            raise BlockError(f"Enabled bitmap '{name}' incompatible with readonly export")
        bitmap.busy = True
        self._bitmaps.setdefault(backend, []).append(bitmap)
        return lambda offset, length: extents(bitmap, offset, length)


def _in_chain(node: Node | None, name: str) -> tuple[Node, DirtyBitmap]:
    while node is not None:
        if (bitmap := node.find_bitmap(name)) is not None:
            return node, bitmap
        node = node.file if node.is_filter else node.backing
    raise BlockError(f"Bitmap '{name}' is not found", errno=ENOENT)


def extents(bitmap: DirtyBitmap, offset: int, length: int) -> Sequence[tuple[int, int]]:
    """(length in bytes, 1 where dirty) for the range, or as far as ``MAX_EXTENTS`` go."""
    found: list[tuple[int, int]] = []
    position = offset
    for start, count in bitmap.runs(offset, length):
        if start > position:
            found.append((start - position, 0))
        found.append((count, 1))
        position = start + count
        if len(found) >= MAX_EXTENTS:
            return found
    if position < offset + length:
        found.append((offset + length - position, 0))
    return found
