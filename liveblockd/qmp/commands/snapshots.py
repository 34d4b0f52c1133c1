"""Commands that take snapshots, external and internal (qapi/block-core.json).

Runs on the event loop. Errors: BlockError, OSError of a flush.
"""

from __future__ import annotations

from typing import Any

from liveblockd.graph import internal_snapshot, snapshot
from liveblockd.graph.snapshot import NewImageMode
from liveblockd.qapi import QapiModel
from liveblockd.qmp.block_info import SnapshotInfo
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


@command("blockdev-snapshot", args=BlockdevSnapshot, features=("allow-write-only-overlay",))
async def blockdev_snapshot(context: Context, arguments: BlockdevSnapshot) -> None:
    """Put an overlay that is open already above a node and its users."""
    await snapshot.snapshot(context.graph, arguments.node, arguments.overlay)


class BlockdevSnapshotInternal(QapiModel):
    """Arguments of blockdev-snapshot-internal-sync."""

    device: str
    name: str


class BlockdevSnapshotDeleteInternal(QapiModel):
    """Arguments of blockdev-snapshot-delete-internal-sync."""

    device: str
    id: str | None = None
    name: str | None = None


@command("blockdev-snapshot-internal-sync", args=BlockdevSnapshotInternal)
async def blockdev_snapshot_internal_sync(
    context: Context, arguments: BlockdevSnapshotInternal
) -> None:
    """Keep the disk as it is now, inside its image."""
    await internal_snapshot.create(context.graph, arguments.device, arguments.name)


@command(
    "blockdev-snapshot-delete-internal-sync",
    args=BlockdevSnapshotDeleteInternal,
    returns=SnapshotInfo,
)
async def blockdev_snapshot_delete_internal_sync(
    context: Context, arguments: BlockdevSnapshotDeleteInternal
) -> dict[str, Any]:
    """Forget an internal snapshot; returns what it was."""
    gone = await internal_snapshot.delete(
        context.graph, arguments.device, arguments.id, arguments.name
    )
    return gone.to_qmp()
