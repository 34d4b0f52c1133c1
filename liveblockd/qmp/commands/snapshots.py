"""Commands that take external snapshots (qapi/block-core.json).

Runs on the event loop. Errors: BlockError, OSError of a flush.
"""

from __future__ import annotations

from liveblockd.graph import snapshot
from liveblockd.graph.snapshot import NewImageMode
from liveblockd.qapi import QapiModel
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command


class BlockdevSnapshotSync(QapiModel):
    """Arguments of blockdev-snapshot-sync."""

    device: str | None = None
    node_name: str | None = None
    snapshot_file: str
    snapshot_node_name: str | None = None
    format: str | None = None  # default: qcow2
    mode: NewImageMode | None = None  # default: absolute-paths


class BlockdevSnapshot(QapiModel):
    """Arguments of blockdev-snapshot."""

    node: str
    overlay: str


@command("blockdev-snapshot-sync", args=BlockdevSnapshotSync, aliases=("snapshot_blkdev",))
async def blockdev_snapshot_sync(context: Context, arguments: BlockdevSnapshotSync) -> None:
    """Create an overlay, and let all users of the node go on with that."""
    await snapshot.snapshot_sync(
        context.graph,
        device=arguments.device,
        node_name=arguments.node_name,
        snapshot_file=arguments.snapshot_file,
        snapshot_node_name=arguments.snapshot_node_name,
        image_format=arguments.format or "qcow2",
        mode=arguments.mode or NewImageMode.ABSOLUTE_PATHS,
        console=context.console,
    )


@command("blockdev-snapshot", args=BlockdevSnapshot)
async def blockdev_snapshot(context: Context, arguments: BlockdevSnapshot) -> None:
    """Put an overlay that is open already above a node and its users."""
    await snapshot.snapshot(context.graph, arguments.node, arguments.overlay)
