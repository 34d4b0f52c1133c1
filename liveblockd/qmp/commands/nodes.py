"""Commands on block nodes: add, delete, reopen, resize, and what the queries say of them.

Specification: qapi/block-core.json. Runs on the event loop. Errors: BlockError, OSError of a flush.
"""

from __future__ import annotations

from typing import Any

from liveblockd.errors import BlockError
from liveblockd.graph import chain, info, surgery
from liveblockd.graph.activation import set_active
from liveblockd.graph.backend import Backend
from liveblockd.graph.children import add_child, remove_child
from liveblockd.graph.node import Operation
from liveblockd.graph.reopen import reopen
from liveblockd.qapi import QapiModel, StrOrNull, UInt64
from liveblockd.qmp.block_info import BlockDeviceInfo, BlockInfo, BlockStats, XDbgBlockGraph
from liveblockd.qmp.commands.objects import object_registry
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import NoArguments, command
from liveblockd.storage.options import BlockdevOptions


class NodeName(QapiModel):
    """A node."""

    node_name: str


class BlockdevReopen(QapiModel):
    """Arguments of blockdev-reopen."""

    options: list[BlockdevOptions]


class BlockdevSetActive(QapiModel):
    """Arguments of blockdev-set-active."""

    node_name: str | None = None
    active: bool


class BlockdevChange(QapiModel):
    """Arguments of x-blockdev-change."""

    parent: str
    child: str | None = None
    node: str | None = None


class BlockdevSetIothread(QapiModel):
    """Arguments of x-blockdev-set-iothread."""

    node_name: str
    iothread: StrOrNull
    force: bool = False


class Flat(QapiModel):
    """Whether to leave out what lies behind an image."""

    flat: bool = False


class QueryBlockstats(QapiModel):
    """Arguments of query-blockstats."""

    query_nodes: bool = False


class BlockResize(QapiModel):
    """Arguments of block_resize; ``size`` in bytes."""

    device: str | None = None
    node_name: str | None = None
    size: int


class ChangeBackingFile(QapiModel):
    """Arguments of change-backing-file."""

    device: str
    image_node_name: str
    backing_file: str


class BlockSetWriteThreshold(QapiModel):
    """Arguments of block-set-write-threshold; ``write-threshold`` is an offset in bytes."""

    node_name: str
    write_threshold: UInt64


@command("blockdev-add", args=BlockdevOptions)
async def blockdev_add(context: Context, arguments: BlockdevOptions) -> None:
    """Open a node."""
    await context.graph.open(arguments)


async def _flush_ahead(context: Context, arguments: NodeName) -> None:
    node = context.graph.nodes.get(arguments.node_name)
    if node is not None and node.monitor_owned and not node.parents:
        await surgery.flush_ahead([node], for_good=True)


@command("blockdev-del", args=NodeName, ahead=_flush_ahead)
async def blockdev_del(context: Context, arguments: NodeName) -> None:
    """Close a node that nobody uses."""
    await context.graph.delete(arguments.node_name)


@command("blockdev-reopen", args=BlockdevReopen)
async def blockdev_reopen(context: Context, arguments: BlockdevReopen) -> None:
    """Change the options of nodes in use."""
    await reopen(context.graph, arguments.options)


@command("x-blockdev-change", args=BlockdevChange, features=("unstable",))
async def blockdev_change(context: Context, arguments: BlockdevChange) -> None:
    """One child more of a quorum, or one less."""
    graph = context.graph
    parent = graph.lookup_any(arguments.parent)
    if arguments.child is not None and arguments.node is not None:
        raise BlockError("The parameters child and node are in conflict")
    if arguments.child is not None:
        await remove_child(graph, parent, arguments.child)
    elif arguments.node is not None:
        node = graph.nodes.get(arguments.node)
        if node is None:
            raise BlockError(f"Node '{arguments.node}' not found")
        await add_child(graph, parent, node)
    else:
        raise BlockError("Either child or node must be specified")


@command("x-blockdev-set-iothread", args=BlockdevSetIothread, features=("unstable",))
async def blockdev_set_iothread(context: Context, arguments: BlockdevSetIothread) -> None:
    """Checked as by QEMU, and without effect: one event loop serves all nodes."""
    node = context.graph.find(arguments.node_name)
    if not arguments.force and any(isinstance(edge.parent, Backend) for edge in node.parents):
        raise BlockError(
            f"Node {node.name} is associated with a BlockBackend and could be in use "
            "(use force=true to override this check)"
        )
    name = arguments.iothread
    if name is not None and object_registry(context).get(name, "iothread") is None:
        raise BlockError(f"Cannot find iothread {name}")


@command("blockdev-set-active", args=BlockdevSetActive)
async def blockdev_set_active(context: Context, arguments: BlockdevSetActive) -> None:
    """Hand images to another process, or take them back."""
    graph = context.graph
    async with graph.lock:
        node = None if arguments.node_name is None else graph.find(arguments.node_name)
        await set_active(graph, node, arguments.active)


@command("query-named-block-nodes", args=Flat, returns=list[BlockDeviceInfo], query=True)
async def query_named_block_nodes(context: Context, arguments: Flat) -> list[dict[str, Any]]:
    """All nodes, newest first."""
    nodes, query = reversed(context.graph.nodes.values()), info.Query(flat=arguments.flat)
    return [info.block_device_info(n, query=query) for n in nodes if n.opened]


@command("query-block", args=Flat, returns=list[BlockInfo], query=True)
async def query_block(context: Context, arguments: Flat) -> list[dict[str, Any]]:
    """All drives."""
    return [info.block_info(d, flat=arguments.flat) for d in context.graph.drives.values()]


@command("query-blockstats", args=QueryBlockstats, returns=list[BlockStats], query=True)
async def query_blockstats(context: Context, arguments: QueryBlockstats) -> list[dict[str, Any]]:
    """Counters of drives, or of nodes."""
    graph = context.graph
    if arguments.query_nodes:
        return [info.node_stats(n) for n in graph.nodes.values() if n.opened]  # oldest first
    return [info.drive_stats(drive) for drive in graph.drives.values()]


@command("x-debug-query-block-graph", returns=XDbgBlockGraph, query=True, features=("unstable",))
async def query_block_graph(
    context: Context,
    arguments: NoArguments,  # noqa: ARG001
) -> dict[str, Any]:
    """Nodes, users and edges with their permissions."""
    return info.debug_graph(context.graph)


@command("block_resize", args=BlockResize, aliases=("block-resize",))
async def block_resize(context: Context, arguments: BlockResize) -> None:
    """Change the virtual size."""
    graph = context.graph
    async with graph.lock:
        node = graph.lookup(arguments.device, arguments.node_name)
        await graph.resize(node, arguments.size)


@command("change-backing-file", args=ChangeBackingFile)
async def change_backing_file(context: Context, arguments: ChangeBackingFile) -> None:
    """Rewrite the backing string of a header; the graph stays as it is."""
    graph = context.graph
    async with graph.lock:
        top = graph.lookup_root(arguments.device)
        image = graph.lookup(None, arguments.image_node_name)
        if not image.driver.backing_file:
            raise BlockError("not allowing backing file change on an image without a backing file")
        image.check_operation(Operation.STREAM)  # a job may be about to write the header itself
        if not chain.is_above(top, image):
            raise BlockError(f"'{arguments.device}' and image file are not in the same chain")
        read_only = image.read_only
        await graph.set_read_only(image, False)
        try:
            await image.driver.change_backing_file(
                arguments.backing_file, image.driver.backing_format
            )
        finally:
            await graph.set_read_only(image, read_only)


@command("block-set-write-threshold", args=BlockSetWriteThreshold)
async def block_set_write_threshold(context: Context, arguments: BlockSetWriteThreshold) -> None:
    """Announce the first write that ends beyond the threshold; 0 takes it back."""
    node = context.graph.nodes.get(arguments.node_name)
    if node is None:
        raise BlockError(f"Device '{arguments.node_name}' not found")
    node.write_threshold = arguments.write_threshold
    context.graph.rebind_above(node)
