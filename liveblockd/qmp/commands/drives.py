"""Drives of a running daemon: their limits, and what ``--drive`` does at the start.

Specification: qapi/block.json, block_set_io_throttle. QMP has no commands for QEMU's drive_add and
drive_del; these are ours, for the human monitor and for clients that ask for them.

Runs on the event loop. Errors: BlockError.
"""

from __future__ import annotations

from typing import Any

from liveblockd.errors import BlockError, ErrorClass
from liveblockd.graph.drive_limits import limit, old_name
from liveblockd.graph.drives import DriveOptions, delete_drive, open_drive
from liveblockd.qapi import QapiModel
from liveblockd.qmp.block_info import IOLimits, Underscored
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command
from liveblockd.storage.filters.buckets import KINDS, Limits, Rate, check


class _Limited(Underscored):
    """What comes before the limits."""

    device: str | None = None
    id: str | None = None


class BlockIOThrottle(IOLimits, _Limited):
    """Arguments of block_set_io_throttle."""


@command("block_set_io_throttle", args=BlockIOThrottle)
async def block_set_io_throttle(context: Context, arguments: BlockIOThrottle) -> None:
    """Limit a drive and the exports of its disk; zeros lift all limits."""
    if (arguments.device is None) == (arguments.id is None):
        raise BlockError("Need exactly one of 'device' and 'id'")
    name = str(arguments.device if arguments.id is None else arguments.id)
    drive = context.graph.drives.get(name)
    if drive is None:
        raise BlockError(f"Device '{name}' not found", error_class=ErrorClass.DEVICE_NOT_FOUND)
    rates = {}
    for kind in KINDS:
        old = old_name(kind)
        burst, length = (getattr(arguments, f"{old}_max{part}") for part in ("", "_length"))
        rates[kind] = Rate(getattr(arguments, old), burst or 0, 1 if length is None else length)
    limits = Limits(rates, arguments.iops_size or 0)
    check(limits)
    limit(context.graph, drive, limits, arguments.group)


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
