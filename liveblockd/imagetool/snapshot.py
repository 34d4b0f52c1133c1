"""``image snapshot``: the internal snapshots of an image: list, create, apply, delete.

Runs on an event loop of its own. Options and exit status are those of ``qemu-img snapshot``; an
action that changes the image is done at one instant (``formats/qcow2/switch``).
"""

from __future__ import annotations

import argparse
import time
from errno import ENOENT

from liveblockd.errors import BlockError
from liveblockd.graph import internal_snapshot
from liveblockd.graph.chain import snapshot_keeper
from liveblockd.graph.node import Node
from liveblockd.imagetool.images import Images, ToolError, reason
from liveblockd.imagetool.output import say
from liveblockd.storage.snapshot_info import SnapshotInfo

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


async def run(args: argparse.Namespace) -> int:
    """The command."""
    change = args.create or args.apply or args.delete
    async with Images(args.objects) as images:
        node = await images.open(
            args.filename, args.format, writable=bool(change), force_share=args.force_share
        )
        try:
            if args.create:
                # As qemu-img: a second one of that name is welcome.
                await snapshot_keeper(node).driver.create_snapshot(
                    args.create, date_nsec=time.time_ns()
                )
            elif args.apply:
                await internal_snapshot.apply(images.graph, node.name, args.apply)
            elif args.delete:
                await _delete(images, node, args.delete)
            else:
                _list(node)
        except (BlockError, OSError) as error:
            what = "create" if args.create else "apply" if args.apply else "delete"
            if not change:
                raise
            raise ToolError(f"Could not {what} snapshot '{change}': {reason(error)}") from error
    return 0


async def _delete(images: Images, node: Node, name: str) -> None:
    # As qemu-img: never by the id, which may be the name of another one.
    found = [s for s in snapshot_keeper(node).driver.list_snapshots() if s.name == name]
    if not found:
        raise BlockError("snapshot not found", errno=ENOENT)
    await internal_snapshot.delete(images.graph, node.name, found[0].id, None)


def _list(node: Node) -> None:
    try:
        snapshots = snapshot_keeper(node).driver.list_snapshots()
    except BlockError:  # a format that has none
        return
    if snapshots:
        say("Snapshot list:")
        say(_row("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"))
    for snapshot in snapshots:
        say(_shown(snapshot))


def _shown(snapshot: SnapshotInfo) -> str:
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.date_sec))
    seconds, nanoseconds = divmod(snapshot.vm_clock_nsec, 1_000_000_000)
    clock = (
        f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{nanoseconds // 10**6:03}"
    )
    icount = "" if snapshot.icount is None else str(snapshot.icount)
    return _row(snapshot.id, snapshot.name, _size(snapshot.vm_state_size), date, clock, icount)


def _row(number: str, tag: str, size: str, date: str, clock: str, icount: str) -> str:
    return f"{number:<9} {tag:<16} {size:>8}{date:>20}{clock:>13}{icount:>11}"


def _size(size: int) -> str:
    unit = min(max(0, size.bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{size / (1 << unit * 10):.3g} {_UNITS[unit]}"
