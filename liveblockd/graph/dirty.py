"""The dirty bitmaps of nodes: add, remove, clear, enable, disable, merge.

Specification: qapi/block-core.json. Each function that a transaction can take back returns a call
that does so. A bitmap that is persistent lives in memory; the driver stores it when the image is
closed or becomes read-only, and until then it is marked as in use on the disk.

Runs on the event loop. Invariant: what fails has changed nothing.
Errors: BlockError in QEMU's words; OSError from ``remove`` of a stored bitmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from errno import ENOENT, ENOTSUP

from liveblockd.errors import BlockError
from liveblockd.graph.bitmaps import (
    MAX_NAME,
    DirtyBitmap,
    check_granularity,
    default_granularity,
)
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.runtime.unbroken import to_its_end

Undo = Callable[[], None]


def find(graph: Graph, node_name: str, name: str) -> tuple[Node, DirtyBitmap]:
    """The node (or drive) and its bitmap; BlockError when there is none."""
    try:
        node = graph.lookup_any(node_name)
    except BlockError:
        raise BlockError(f"Node '{node_name}' not found", errno=ENOENT) from None
    bitmap = node.find_bitmap(name)
    if bitmap is None:
        raise BlockError(f"Dirty bitmap '{name}' not found", errno=ENOENT)
    return node, bitmap


def add(
    graph: Graph,
    node_name: str,
    name: str,
    *,
    granularity: int | None = None,
    persistent: bool = False,
    enabled: bool = True,
) -> Undo:
    """A new, clean bitmap; ``granularity`` in bytes. Writes in flight may escape it."""
    check_bitmap_name(name)
    node = graph.lookup_any(node_name)
    if granularity is None:
        granularity = default_granularity(node.driver.cluster_size)
    check_granularity(granularity)
    if persistent:
        _check_storable(node, name, granularity)
    if node.find_bitmap(name) is not None:
        raise BlockError(f"Bitmap already exists: {name}")
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
        raise BlockError(f"Bitmap name too long: {name}")
    bitmap = DirtyBitmap(node.length, granularity, name=name)
    bitmap.persistent = persistent
    bitmap.enabled = enabled
    node.add_bitmap(bitmap)
    graph.rebind_above(node)

    def undo() -> None:
        node.remove_bitmap(bitmap)
        graph.rebind_above(node)

    return undo


async def add_between_writes(
    graph: Graph,
    node_name: str,
    name: str,
    *,
    granularity: int | None = None,
    persistent: bool = False,
    enabled: bool = True,
) -> None:
    """As ``add``, while no request is in flight.

    A write that began without a bitmap is not recorded when it ends, and whoever copied the disk
    after the bitmap was there, and before that end, would never copy it again.
    """
    check_bitmap_name(name)
    async with graph.lock, graph.drained(graph.lookup_any(node_name)):
        add(
            graph,
            node_name,
            name,
            granularity=granularity,
            persistent=persistent,
            enabled=enabled,
        )


def check_bitmap_name(name: str) -> None:
    """BlockError if no bitmap can be called that."""
    if not name:
        raise BlockError("Bitmap name cannot be empty")


def _check_storable(node: Node, name: str, granularity: int) -> None:
    others = sum(1 for bitmap in node.bitmaps if bitmap.persistent)
    try:
        if node.read_only:
            raise BlockError("Block node is read-only", errno=1)
        node.check_active()
        node.driver.check_new_bitmap(name, granularity, others)
    except BlockError as error:
        if error.errno == ENOTSUP and not node.driver.cluster_size:
            raise BlockError(
                f"Can't store persistent bitmaps to {node.name}: {error.message}", errno=ENOTSUP
            ) from None
        raise BlockError(
            f"Can't make bitmap '{name}' persistent in '{node.name}': {error.message}",
            errno=error.errno,
        ) from None


class Removal:
    """A bitmap that is about to go: the image has forgotten it, and nobody may use it."""

    def __init__(self, graph: Graph, node: Node, bitmap: DirtyBitmap) -> None:
        self._graph = graph
        self._node = node
        self._bitmap = bitmap
        self._was_persistent = bitmap.persistent

    async def begin(self) -> None:
        """Forget it in the image; OSError: nothing has changed."""
        bitmap = self._bitmap
        if bitmap.persistent:
            await self._node.driver.remove_bitmap(bitmap.name)
            bitmap.persistent = False
        bitmap.busy = True

    def commit(self) -> None:
        """It is gone."""
        self._bitmap.busy = False
        self._node.remove_bitmap(self._bitmap)
        self._graph.rebind_above(self._node)

    def undo(self) -> None:
        """It stays, and is stored when the image is closed."""
        self._bitmap.busy = False
        self._bitmap.persistent = self._was_persistent


async def begin_removal(graph: Graph, node_name: str, name: str) -> Removal:
    """End it by ``commit`` or ``undo``; the lock is held until then."""
    node, bitmap = find(graph, node_name, name)
    bitmap.check(read_only=node.read_only, allow_inconsistent=True)
    removal = Removal(graph, node, bitmap)
    await to_its_end(removal.begin())
    return removal


async def remove(graph: Graph, node_name: str, name: str) -> None:
    """Forget a bitmap, in the image too."""
    async with graph.lock:
        node, bitmap = find(graph, node_name, name)
        bitmap.check(read_only=node.read_only, allow_inconsistent=True)
        if bitmap.persistent:
            await to_its_end(node.driver.remove_bitmap(name))
        node.remove_bitmap(bitmap)
        graph.rebind_above(node)


def clear(graph: Graph, node_name: str, name: str) -> Undo:
    """All is clean."""
    node, bitmap = find(graph, node_name, name)
    bitmap.check(read_only=node.read_only)
    saved = bitmap.copy()
    bitmap.clear()
    return lambda: bitmap.merge(saved)


def set_enabled(graph: Graph, node_name: str, name: str, enabled: bool) -> Undo:
    """Whether writes are recorded."""
    _, bitmap = find(graph, node_name, name)
    bitmap.check()
    before = bitmap.enabled
    bitmap.enabled = enabled

    def undo() -> None:
        bitmap.enabled = before

    return undo


def merge(graph: Graph, node_name: str, target: str, sources: Sequence[tuple[str, str]]) -> Undo:
    """What is dirty in one of ``sources`` (node, bitmap) is dirty in ``target`` too."""
    node, bitmap = find(graph, node_name, target)
    bitmap.check(read_only=node.read_only)
    found = []
    for source_node, name in sources:
        _, source = find(graph, source_node, name)
        source.check()
        if source.size != bitmap.size:
            raise BlockError(
                f"Bitmaps are of different sizes (destination size is {bitmap.size}, "
                f"source size is {source.size}) and can't be merged"
            )
        found.append(source)
    saved = bitmap.copy()
    for source in found:
        bitmap.merge(source)
    return lambda: bitmap.restore(saved)
