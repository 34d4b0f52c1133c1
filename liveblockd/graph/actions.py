"""What a transaction can do to the graph: snapshots, external and internal, and dirty bitmaps.

Specification: qapi/transaction.json. Runs on the event loop; how an action lives is told in
``transaction``. Invariants: an action that has not been committed is taken back by ``undo`` without
a trace but for the file of a new overlay, which stays, as QEMU leaves it.
Errors: BlockError in QEMU's words; OSError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

from liveblockd.errors import BlockError
from liveblockd.graph import chain, dirty, internal_snapshot, surgery
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.graph.snapshot import NewOverlay, SnapshotRequest, check_snapshot
from liveblockd.graph.surgery import PlacedOverlay
from liveblockd.graph.transaction import Action


class Abort(Action):
    """Fails, for tests."""

    async def prepare(self) -> None:
        """Fail."""
        raise BlockError("Transaction aborted using Abort action")


class _Overlaying(Action):
    """What is put above a disk; ``prepare`` sets ``_placed``."""

    flushes = True
    _placed: PlacedOverlay | None = None

    async def seal(self) -> None:
        """The old image becomes read-only."""
        assert self._placed is not None
        await self._placed.seal()

    async def commit(self) -> None:
        """The users take the overlay for their disk."""
        assert self._placed is not None
        self._placed.announce()

    async def undo(self) -> None:
        """As it was."""
        if self._placed is not None:
            await self._placed.undo()


class SnapshotSync(_Overlaying):
    """blockdev-snapshot-sync."""

    def __init__(
        self, graph: Graph, request: SnapshotRequest, console: Callable[[str], None]
    ) -> None:
        self._graph = graph
        self._request = request
        self._console = console
        self._new: NewOverlay | None = None

    def names(self) -> Iterable[str]:
        """The node that is to have an overlay."""
        return [n for n in (self._request.device, self._request.node_name) if n is not None]

    def may_go_ahead(self) -> bool:
        """The overlay is created and opened."""
        return True

    async def go_ahead(self) -> None:
        """Create and open."""
        new = NewOverlay(self._graph, self._request)
        self._new = new
        await new.open(self._console)

    async def prepare(self) -> None:
        """Put it in its place."""
        if self._new is None:
            await self.go_ahead()
        assert self._new is not None and self._new.overlay is not None
        self._placed = await surgery.place_overlay(self._graph, self._new.node, self._new.overlay)

    async def commit(self) -> None:
        """The users take the overlay for their disk; without any it is closed."""
        await super().commit()
        assert self._placed is not None
        await self._graph.unref(self._placed.overlay)

    async def undo(self) -> None:
        """The overlay is closed; its file stays, unless it was not its turn yet."""
        await super().undo()
        if self._new is not None and self._new.overlay is not None:
            await self._graph.unref(self._new.overlay)
        if self._new is not None and self.too_early:
            await self._new.discard()


class Snapshot(_Overlaying):
    """blockdev-snapshot."""

    def __init__(self, graph: Graph, node: str, overlay: str) -> None:
        self._graph = graph
        self._node = node
        self._overlay = overlay

    def names(self) -> Iterable[str]:
        """Both nodes."""
        return (self._node, self._overlay)

    async def prepare(self) -> None:
        """Put the overlay in its place."""
        node, overlay = check_snapshot(self._graph, self._node, self._overlay)
        self._placed = await surgery.place_overlay(self._graph, node, overlay)


class InternalSnapshot(Action):
    """blockdev-snapshot-internal-sync."""

    flushes = True

    def __init__(self, graph: Graph, device: str, name: str) -> None:
        self._graph = graph
        self._device = device
        self._name = name
        self._made: tuple[Node, str] | None = None

    def names(self) -> Iterable[str]:
        """The disk, and the image below it that has the snapshots."""
        with suppress(BlockError):  # found when it is its turn
            disk = self._graph.lookup_any(self._device)
            return (self._device, chain.snapshot_keeper(disk).name)
        return (self._device,)

    async def prepare(self) -> None:
        """Take it."""
        node = self._graph.lookup_any(self._device)
        made = await internal_snapshot.create(self._graph, self._device, self._name)
        self._made = node, made.id

    async def undo(self) -> None:
        """Delete it."""
        if self._made is not None:
            node, snapshot_id = self._made
            await internal_snapshot.delete(self._graph, node.name, snapshot_id, None)


class BitmapAction(Action):
    """A change of a dirty bitmap that gives the call by which it is taken back."""

    def __init__(self, node: str, step: Callable[[], dirty.Undo]) -> None:
        self._node = node
        self._step = step
        self._undo: dirty.Undo | None = None

    def names(self) -> Iterable[str]:
        """The node of the bitmap."""
        return (self._node,)

    async def prepare(self) -> None:
        """Do it."""
        self._undo = self._step()

    async def undo(self) -> None:
        """Take it back."""
        if self._undo is not None:
            self._undo()


class RemoveBitmap(Action):
    """block-dirty-bitmap-remove: busy until the end, then gone."""

    def __init__(self, graph: Graph, node: str, name: str) -> None:
        self._graph = graph
        self._node = node
        self._name = name
        self._removal: dirty.Removal | None = None

    def names(self) -> Iterable[str]:
        """The node of the bitmap."""
        return (self._node,)

    async def prepare(self) -> None:
        """Nobody may use it any more; the image forgets it."""
        self._removal = await dirty.begin_removal(self._graph, self._node, self._name)

    async def commit(self) -> None:
        """Forget it."""
        assert self._removal is not None
        self._removal.commit()

    async def undo(self) -> None:
        """It is there, and stored when the image is closed."""
        if self._removal is not None:
            self._removal.undo()
