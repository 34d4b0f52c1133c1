"""What the queries say of nodes and drives: BlockDeviceInfo, ImageInfo, BlockInfo, BlockStats.

Specification: qapi/block-core.json. Members are added here only where they hold something.

Pure but for asking the drivers; runs on the event loop. Raises nothing of its own.
"""

from __future__ import annotations

import contextlib
from typing import Any

from liveblockd.errors import BlockError
from liveblockd.graph import chain, drive_limits, filenames
from liveblockd.graph.backend import Backend
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.graph.permissions import names
from liveblockd.graph.statistics import Statistics

_UNLIMITED = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
#: drivers that cannot tell anything of their image
_UNKNOWING = ("null-co", "null-aio", "quorum")
#: drivers that do not say what they take of the host
_UNSIZED = ("blkdebug", "blkverify")


class Query:
    """What one query has found out so far; nodes of one chain share most of it.

    Valid as long as nothing is awaited.
    """

    def __init__(self, *, flat: bool = False) -> None:
        self.flat = flat
        self.names: filenames.Known = {}
        self._images: dict[Node, dict[str, Any]] = {}

    def image(self, node: Node) -> dict[str, Any]:
        """ImageInfo, with those of the chain below unless ``flat``."""
        if self.flat:
            return _own_image_info(node, self.names)
        # In a loop from the bottom up: a chain may be deeper than Python's stack likes.
        layers = [node] if node.is_filter else []
        for layer in (*layers, *chain.chain(node))[::-1]:
            if layer in self._images:
                below = self._images[layer]
                continue
            info = _own_image_info(layer, self.names)
            if layer.is_filter or chain.layer_below(layer) is not None:
                info["backing-image"] = below
            self._images[layer] = below = info
        return below


def block_device_info(
    node: Node,
    *,
    flat: bool = False,
    backend: Backend | None = None,
    query: Query | None = None,
) -> dict[str, Any]:
    """BlockDeviceInfo; ``flat`` leaves out what lies behind the image itself.

    Who asks for many nodes hands in one ``query`` for all of them.
    """
    query = Query(flat=flat) if query is None else query
    flat = query.flat
    cache = node.options.cache
    info: dict[str, Any] = {
        "node-name": node.name,
        "drv": node.driver_class.driver_name,
        "file": filenames.filename(node, query.names),
        "ro": node.read_only,
        "encrypted": node.driver.encrypted,
        "active": node.active,
        "children": [
            {"child": role, "node-name": edge.child.name} for role, edge in node.children.items()
        ],
        "backing_file_depth": 0 if flat else _depth(node, for_drive=backend is not None),
        "detect_zeroes": str(node.detect_zeroes),
        "cache": {
            "writeback": not (backend is not None and backend.writethrough),
            "direct": bool(cache and cache.direct),
            "no-flush": bool(cache and cache.no_flush),
        },
        "write_threshold": _signed(node.write_threshold),
        **_UNLIMITED,
        **({} if backend is None else drive_limits.to_info(backend)),
        "image": query.image(node),
    }
    if node.backing is not None:
        info["backing_file"] = filenames.filename(node.backing, query.names)
    if node.bitmaps:
        info["dirty-bitmaps"] = [bitmap.to_qmp() for bitmap in node.bitmaps]
    return info


def _signed(value: int) -> int:
    """As the schema has it; the command takes all 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _depth(node: Node, *, for_drive: bool) -> int:
    """How many nodes are below ``node``; a drive does not know of filters that nobody named."""
    edges = chain.edges_between(node, None)
    return sum(not (for_drive and edge.child.implicit) for edge in edges)


def _own_image_info(node: Node, names: filenames.Known) -> dict[str, Any]:
    driver = node.driver
    info: dict[str, Any] = {
        "filename": filenames.filename(node, names),
        "format": node.driver_class.driver_name,
        "virtual-size": driver.virtual_size,
        "limits": dict(driver.limits()),
    }
    size = _actual_size(node)
    if size is not None:
        info["actual-size"] = size
    image = chain.skip_filters(node) or node
    if image.driver.cluster_size:
        info["cluster-size"] = image.driver.cluster_size
    if driver.encrypted:
        info["encrypted"] = True
    if image.driver_class.driver_name not in _UNKNOWING:
        info["dirty-flag"] = image.driver.dirty_flag()
    with contextlib.suppress(BlockError):  # a format without internal snapshots
        if snapshots := chain.snapshot_keeper(node).driver.list_snapshots():
            info["snapshots"] = [snapshot.to_qmp() for snapshot in snapshots]
    specific = driver.format_specific()
    if specific is None and info["format"] in ("file", "host_device"):
        specific = {"type": "file", "data": {}}
    if specific is not None:
        info["format-specific"] = dict(specific)
    if written := driver.backing_file:
        info["backing-filename"] = written
        # Without: "cannot determine actual path".
        with contextlib.suppress(BlockError):
            info["full-backing-filename"] = filenames.full_backing_filename(node, written)
        if driver.backing_format:
            info["backing-filename-format"] = driver.backing_format
    return info


def _actual_size(node: Node) -> int | None:
    """Bytes of the host in use: those of the node itself, of what it filters, or of its parts."""
    size = node.driver.actual_size()
    if size is not None or node.driver_class.driver_name in _UNSIZED:
        return size
    if node.is_filter:
        return None if node.file is None else _actual_size(node.file)
    parts = [_actual_size(e.child) for role, e in node.children.items() if role != "backing"]
    known = [part for part in parts if part is not None]
    return sum(known) if known and len(known) == len(parts) else None


def block_info(drive: Backend, *, flat: bool = False) -> dict[str, Any]:
    """BlockInfo of a drive that no guest device is made of."""
    node = drive.node.asked_for
    return {
        "device": drive.name,
        "type": "unknown",
        "removable": True,
        "locked": False,
        "io-status": "ok",
        "inserted": block_device_info(node, flat=flat, backend=drive),
    }


def drive_stats(drive: Backend) -> dict[str, Any]:
    """BlockStats of a drive, its node's children below."""
    node = drive.node.asked_for
    stats = node_stats(node)
    stats["device"] = drive.name
    stats["stats"] = drive.statistics.to_qmp()
    below, place = node.backing, stats
    while below is not None:
        place["backing"] = node_stats(below)
        place, below = place["backing"], below.backing
    return stats


def node_stats(node: Node) -> dict[str, Any]:
    """BlockStats of a node and of its file; drives, exports and jobs count requests, not nodes."""
    counted = _counted_at(node).to_qmp() | {"account_invalid": False, "account_failed": False}
    stats: dict[str, Any] = {"node-name": node.name, "stats": counted}
    if (specific := node.driver.statistics()) is not None:
        stats["driver-specific"] = {"driver": node.driver_class.driver_name, **specific}
    if node.file is not None:
        stats["parent"] = node_stats(node.file)
    return stats


def _counted_at(node: Node) -> Statistics:
    """The one user that stands on the node, or zeros."""
    users = [e.parent for e in node.parents if isinstance(e.parent, Backend)]
    return users[0].statistics if len(users) == 1 else Statistics()


def debug_graph(graph: Graph) -> dict[str, Any]:
    """XDbgBlockGraph of x-debug-query-block-graph."""
    numbers: dict[object, int] = {}
    nodes = []
    for backend in graph.backends:
        numbers[backend] = len(numbers) + 1
        name = backend.name or backend.user or ""
        nodes.append({"id": numbers[backend], "type": "block-backend", "name": name})
    for node in graph.nodes.values():
        numbers[node] = len(numbers) + 1
        nodes.append({"id": numbers[node], "type": "block-driver", "name": node.name})
    edges = [
        {
            "parent": numbers[edge.parent],
            "child": numbers[node],
            "name": edge.role,
            "perm": names(edge.used),
            "shared-perm": names(edge.shared),
        }
        for node in graph.nodes.values()
        for edge in node.parents
    ]
    return {"nodes": nodes, "edges": edges}
