"""Internal snapshots of nodes in use, and what goes back to one offline.

Specification: qapi/block-core.json (blockdev-snapshot-internal-sync and its opposite).

A filter, or a raw node, has the snapshots of the image below it (``chain.snapshot_keeper``).

Runs on the event loop. The image is drained, with all users above it, whichever node was named; the
driver switches at one instant. Invariant: what fails leaves the image and its snapshots as they
were.
Errors: BlockError in QEMU's words; OSError.
"""

from __future__ import annotations

import contextlib
import time
from errno import EBUSY, ENOENT, EPERM

from liveblockd.errors import BlockError
from liveblockd.graph import chain
from liveblockd.graph.backend import Backend
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node, Operation
from liveblockd.runtime.unbroken import to_its_end
from liveblockd.storage.snapshot_info import SnapshotInfo


def disks(graph: Graph) -> list[tuple[str, list[SnapshotInfo] | None]]:
    """The snapshots of all disks that are written to: of drives, of nodes that somebody uses, and
    of those that nobody does, by the name of the drive or node. None: the format has no such thing.
    """
    found: dict[Node, str] = {}
    for drive in graph.drives.values():
        found.setdefault(drive.node.asked_for, drive.name)
    for node in graph.nodes.values():
        if not node.parents or any(isinstance(edge.parent, Backend) for edge in node.parents):
            found.setdefault(node.asked_for, node.asked_for.name)
    return [(name, _listed(node)) for node, name in found.items() if not node.read_only]


def _listed(node: Node) -> list[SnapshotInfo] | None:
    with contextlib.suppress(BlockError):
        return list(chain.snapshot_keeper(node).driver.list_snapshots())
    return None


async def create(graph: Graph, device: str, name: str) -> SnapshotInfo:
    """blockdev-snapshot-internal-sync; what was made."""
    async with graph.lock:
        node = graph.lookup_root(device)
        _check_writable(node, device)
        image = _image(node, device)
        try:
            known = image.driver.list_snapshots()
        except BlockError:
            raise _unsupported(node, device) from None
        if not name:
            raise BlockError("Name is empty")
        if any(snapshot.name == name for snapshot in known):
            raise BlockError(f"Snapshot with name '{name}' already exists on device '{device}'")
        async with graph.drained(image):
            try:
                await to_its_end(image.driver.create_snapshot(name, date_nsec=time.time_ns()))
            except OSError as error:
                raise BlockError.from_os_error(
                    f"Failed to create snapshot '{name}' on device '{device}'", error
                ) from error
        return image.driver.list_snapshots()[-1]


async def delete(
    graph: Graph, device: str, snapshot_id: str | None, name: str | None
) -> SnapshotInfo:
    """blockdev-snapshot-delete-internal-sync; what was deleted."""
    async with graph.lock:
        node = graph.lookup_root(device)
        if snapshot_id is None and name is None:
            raise BlockError("Name or id must be provided")
        image = _image(node, device)
        try:
            known = image.driver.list_snapshots()
        except BlockError as error:
            raise BlockError(
                f"Failed to get a snapshot list: {error.message}", errno=error.errno
            ) from None
        found = next(
            (s for s in known if snapshot_id in (None, s.id) and name in (None, s.name)), None
        )
        if found is None:
            shown = ["null" if given is None else given for given in (snapshot_id, name)]
            raise BlockError(
                f"Snapshot with id '{shown[0]}' and name '{shown[1]}' "
                f"does not exist on device '{device}'",
                errno=ENOENT,
            )
        _check_writable(node, device)
        async with graph.drained(image):
            await to_its_end(image.driver.delete_snapshot(found.id))
        return found


async def apply(graph: Graph, device: str, name_or_id: str) -> SnapshotInfo:
    """Go back to a snapshot, by its id or else its name; nobody may use the disk.

    Bitmaps that record writes say afterwards that all of the disk was written to.
    """
    async with graph.lock:
        node = graph.lookup_any(device)
        if node.parents:
            raise BlockError(f"Node '{node.name}' is in use", errno=EBUSY)
        _check_writable(node, device)
        image = _image(node, device)
        known = image.driver.list_snapshots()
        found = next((s for s in known if s.id == name_or_id), None)
        found = found or next((s for s in known if s.name == name_or_id), None)
        if found is None:
            raise BlockError(f"Can't find snapshot '{name_or_id}'", errno=ENOENT)
        for bitmap in image.bitmaps:
            bitmap.check(allow_inconsistent=True)
        await to_its_end(_apply(image, found.id))
        return found


async def _apply(node: Node, snapshot_id: str) -> None:
    await node.driver.apply_snapshot(snapshot_id)
    for bitmap in node.bitmaps:
        bitmap.resize(node.length)
        bitmap.record(0, node.length)


def _image(node: Node, device: str) -> Node:
    """Whose snapshots ``node`` has; BlockError when anything down to it is in use by a job."""
    image = chain.snapshot_keeper(node)
    above: Node | None = node
    while above is not None:
        above.check_operation(Operation.INTERNAL_SNAPSHOT)
        above = None if above is image else next(iter(above.children.values())).child
    if image.read_only and not node.read_only:
        raise _unsupported(node, device)
    image.check_active()
    return image


def _unsupported(node: Node, device: str) -> BlockError:
    return BlockError(
        f"Block format '{node.driver_class.driver_name}' used by device '{device}' "
        "does not support internal snapshots",
        errno=95,
    )


def _check_writable(node: Node, device: str) -> None:
    if node.read_only:
        raise BlockError(f"Device '{device}' is read only", errno=EPERM)
    node.check_active()
