"""Drives of a running daemon: what ``--drive`` does at the start (QEMU's drive_add and drive_del).

QMP has no such commands; these are ours, for the human monitor and for clients that ask for them.
Runs on the event loop. Errors: BlockError.
"""

from __future__ import annotations

from typing import Any

from liveblockd.graph.drives import DriveOptions, delete_drive, open_drive
from liveblockd.qapi import QapiModel
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command


class DriveAdd(QapiModel):
    """``options``: the members of ``--drive``, nested."""

    options: dict[str, Any]


class DriveAdded(QapiModel):
    """The id of the new drive and the name of its node."""

    device: str
    node_name: str


class DriveDel(QapiModel):
    """A drive."""

    id: str


@command("x-liveblock-drive-add", args=DriveAdd, returns=DriveAdded, features=("unstable",))
async def drive_add(context: Context, arguments: DriveAdd) -> DriveAdded:
    """Open an image and make a drive of it."""
    drive = await open_drive(context.graph, DriveOptions.split(arguments.options))
    return DriveAdded(device=drive.name, node_name=drive.node.name)


@command("x-liveblock-drive-del", args=DriveDel, features=("unstable",))
async def drive_del(context: Context, arguments: DriveDel) -> None:
    """Close a drive; exports of its image stay."""
    await delete_drive(context.graph, arguments.id)
