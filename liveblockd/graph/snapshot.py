"""External snapshots: a new overlay above a node in use (blockdev-snapshot, -snapshot-sync).

Specification: qapi/block-core.json; the recipes of QEMU's docs/interop/live-block-operations.

The order that keeps data: the overlay is created and durable, with its name in the directory, then
opened; requests are drained; the old image is flushed, the switch made, the old image made
read-only; requests go on. Up to the switch nothing has changed for anybody, and a failure leaves at
most an unused file, which is removed if it was not there before.

Runs on the event loop, file system calls on workers. Errors: BlockError in QEMU's words; OSError
of a flush.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

from liveblockd.errors import BlockError
from liveblockd.graph import filenames, surgery
from liveblockd.graph.graph import Graph
from liveblockd.graph.new_file import new_file, remove_file
from liveblockd.graph.node import Node, Operation
from liveblockd.graph.opening import check_node_name
from liveblockd.graph.permissions import cumulative
from liveblockd.qapi import parse
from liveblockd.runtime.unbroken import to_its_end
from liveblockd.storage.driver import BlockDriver, Permission
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import drivers

#: longest backing string that an image format can hold, in bytes
MAX_BACKING_NAME: Final = 1023


class NewImageMode(enum.StrEnum):
    """Whether the overlay is to be created."""

    EXISTING = "existing"
    ABSOLUTE_PATHS = "absolute-paths"


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """Members of blockdev-snapshot-sync."""

    device: str | None
    node_name: str | None
    snapshot_file: str
    snapshot_node_name: str | None = None
    image_format: str = "qcow2"
    mode: NewImageMode = NewImageMode.ABSOLUTE_PATHS


class NewOverlay:
    """An overlay that was created and opened for ``node``, and is above nothing yet.

    ``made``: its file was not there before.
    """

    def __init__(self, graph: Graph, request: SnapshotRequest) -> None:
        self._graph = graph
        self._request = request
        self.node = graph.lookup(request.device, request.node_name)
        self.overlay: Node | None = None
        self.made = False

    async def open(self, console: Callable[[str], None]) -> Node:
        """Check, create, open; the lock is held. ``console`` takes the line ``Formatting ...``."""
        graph, node, request = self._graph, self.node, self._request
        driver = self._check()
        creating = request.mode is NewImageMode.ABSOLUTE_PATHS
        if creating and "backing" not in driver.child_roles:
            raise BlockError(f"Backing file not supported for file format '{request.image_format}'")
        if creating:
            self.made = await create_overlay(graph, node, request.snapshot_file, console)
        self.overlay = await graph.open(
            _overlay_options(
                node, request.snapshot_file, request.snapshot_node_name, request.image_format
            ),
            monitor_owned=False,
        )
        if creating:
            self.overlay.implied_backing = (self.overlay.driver.backing_file or "", node.filename)
        return self.overlay

    def _check(self) -> type[BlockDriver]:
        graph, request = self._graph, self._request
        self.node.check_operation(Operation.SNAPSHOT)
        driver = drivers().get(request.image_format)
        if driver is None:
            what = "file format" if request.mode is NewImageMode.ABSOLUTE_PATHS else "driver"
            raise BlockError(f"Unknown {what} '{request.image_format}'")
        name = request.snapshot_node_name
        if request.node_name is not None and name is None:
            raise BlockError("New overlay node-name missing")
        if name is not None:
            if name in graph.nodes or name in graph.drives:
                raise BlockError("New overlay node-name already in use")
            check_node_name(name)
        return cast("type[BlockDriver]", driver)

    async def discard(self) -> None:
        """Remove the file, if it was made and nobody writes to it.

        Cancelled at the very end, the overlay may be what the guest writes to already.
        """
        if self.made and (self.overlay is None or self.overlay.backing is not self.node):
            path = filenames.protocol_options(self._request.snapshot_file)["filename"]
            await to_its_end(remove_file(self._graph, path))


async def snapshot_sync(
    graph: Graph,
    *,
    device: str | None,
    node_name: str | None,
    snapshot_file: str,
    snapshot_node_name: str | None = None,
    image_format: str = "qcow2",
    mode: NewImageMode = NewImageMode.ABSOLUTE_PATHS,
    console: Callable[[str], None] = print,
) -> None:
    """blockdev-snapshot-sync. ``console`` takes the line ``Formatting ...``."""
    request = SnapshotRequest(
        device, node_name, snapshot_file, snapshot_node_name, image_format, mode
    )
    async with graph.lock:
        new = NewOverlay(graph, request)
        try:
            overlay = await new.open(console)
            try:
                await surgery.append_overlay(graph, new.node, overlay)
            finally:
                await graph.unref(overlay)
        except BaseException:
            await new.discard()
            raise


def check_snapshot(graph: Graph, node_name: str, overlay_name: str) -> tuple[Node, Node]:
    """The node and the overlay of blockdev-snapshot, which may be put above it.

    The target of a mirror may be one: who copies the layers below it meanwhile adds those late.
    """
    node = graph.lookup_any(node_name)
    node.check_operation(Operation.SNAPSHOT)
    overlay = graph.lookup_any(overlay_name)
    surgery.check_no_cycle(overlay, node)
    if overlay.awaits_backing and not cumulative(overlay)[0] & Permission.CONSISTENT_READ:
        return node, overlay
    if any(edge.role == "root" for edge in overlay.parents):
        raise BlockError("The overlay is already in use", errno=16)
    overlay.check_operation(Operation.SNAPSHOT)
    if overlay.parents:
        raise BlockError("The overlay is already in use", errno=16)
    return node, overlay


async def snapshot(graph: Graph, node_name: str, overlay_name: str) -> None:
    """blockdev-snapshot: put an overlay that is open already above a node."""
    async with graph.lock:
        await surgery.append_overlay(graph, *check_snapshot(graph, node_name, overlay_name))


def _overlay_options(
    node: Node, filename: str, name: str | None, image_format: str
) -> BlockdevOptions:
    """The overlay is cached, unmaps and detects zeros as the node did for its users."""
    of_node = node.options
    members: dict[str, Any] = {
        "driver": image_format,
        "file": filenames.protocol_options(filename),
        "read-only": False,
    }
    if name is not None:
        members["node-name"] = name
    if "backing" in drivers()[image_format].child_roles:
        members["backing"] = None
    if of_node.cache is not None:
        members["cache"] = of_node.cache.to_qmp()
    if of_node.discard is not None:
        members["discard"] = str(of_node.discard)
    if of_node.detect_zeroes is not None:
        members["detect-zeroes"] = str(of_node.detect_zeroes)
    return parse(BlockdevOptions, members)


# -- the new image


async def create_overlay(
    graph: Graph, node: Node, filename: str, console: Callable[[str], None]
) -> bool:
    """Create ``filename`` as an empty qcow2 overlay of ``node``, durable; whether it is new.

    A file that is there already is overwritten, unless somebody uses it.
    """
    from liveblockd.formats.qcow2.create import create_qcow2

    backing, backing_format = backing_string(node, filename), node.driver_class.driver_name
    if filename == node.filename:
        raise BlockError(
            "Error: Trying to create an image with the same filename as the backing file"
        )
    if len(backing.encode()) > MAX_BACKING_NAME:
        raise BlockError("Backing file name too long")
    size = node.driver.virtual_size
    console(
        f"Formatting '{filename}', fmt=qcow2 cluster_size=65536 extended_l2=off "
        f"compression_type=zlib size={size} backing_file={backing} "
        f"backing_fmt={backing_format} lazy_refcounts=off refcount_bits=16"
    )
    options = filenames.protocol_options(filename)
    if options.get("driver") != "file" or "filename" not in options:
        raise BlockError(f"Could not create '{filename}': Operation not supported", errno=95)
    try:
        async with new_file(graph, options["filename"], filename) as new:
            await create_qcow2(
                new.node, size=size, backing_file=backing, backing_format=backing_format
            )
            await new.node.flush()
    except OSError as error:
        raise BlockError.from_os_error(f"Could not create '{filename}'", error) from error
    return new.made


def backing_string(node: Node, overlay: str) -> str:
    """What the header of a new ``overlay`` says of ``node``: its name, as long as it leads there.

    A name in a header is seen from the directory of the image, one of ours from the directory of
    the daemon. Where these differ the absolute name is written: with the other one the overlay
    could never be opened again.
    """
    name = node.filename
    plain = filenames.exact_filename(node)
    if plain is None or name.startswith("/") or filenames.has_protocol(name):
        return name
    own = overlay.removeprefix("file:")
    seen = os.path.realpath(os.path.join(os.path.dirname(own), name))
    return name if seen == os.path.realpath(name) else os.path.abspath(name)
