"""``image resize``: another size for the disk in an image.

Runs on an event loop of its own. Words and exit status are those of ``qemu-img resize``.
"""

from __future__ import annotations

import argparse

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.formats.qcow2.preallocate import Preallocation
from liveblockd.graph.node import Node
from liveblockd.graph.resizing import resize
from liveblockd.imagetool.images import Images, ToolError, reason, size_of
from liveblockd.imagetool.output import say, warn


def _preallocation(text: str, shrinking: bool, node: Node) -> Preallocation:
    try:
        mode = Preallocation(text)
    except ValueError:
        raise ToolError(f"Invalid preallocation mode '{text}'") from None
    if mode is Preallocation.OFF:
        return mode
    if shrinking:
        raise ToolError("Preallocation can only be used for growing images")
    if mode is Preallocation.METADATA and not isinstance(node.driver, Qcow2):
        raise ToolError("Unsupported preallocation mode: metadata")
    return mode


async def run(args: argparse.Namespace) -> int:
    """The command."""
    sign = args.size[:1] if args.size[:1] in "+-" else ""
    amount = size_of(args.size.removeprefix(sign))
    async with Images(args.objects) as images:
        node = await images.open(args.filename, args.format, writable=True)
        current = node.driver.virtual_size
        size = {"+": current + amount, "-": current - amount}.get(sign, amount)
        if size <= 0:
            raise ToolError("New image size must be positive")
        if size < current and not args.shrink:
            warn("Use the --shrink option to perform a shrink operation.")
            raise ToolError(
                "warning: Shrinking an image will delete all data beyond the shrunken image's "
                "end. Before performing such an operation, make sure there is no important data "
                "there."
            )
        mode = _preallocation(args.preallocation, size < current, node)
        try:
            await resize(images.graph, node, size, mode)
        except (BlockError, OSError) as error:
            raise ToolError(reason(error)) from error
    say("Image resized.", quiet=args.quiet)
    return 0
