"""``image resize``: another size for the disk in an image.

Runs on an event loop of its own. Words and exit status are those of ``qemu-img resize``.
"""

from __future__ import annotations

import argparse
import os

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.formats.qcow2.preallocate import Preallocation
from liveblockd.graph.node import Node
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
    if isinstance(node.driver, Qcow2) and node.driver.encrypted:
        raise ToolError("Encrypted images are not preallocated")
    return mode


async def _preallocate(
    images: Images, node: Node, mode: Preallocation, offset: int, length: int
) -> None:
    """Space for what is new; raises OSError."""
    if mode is Preallocation.OFF:
        return
    if isinstance(node.driver, Qcow2):
        await node.driver.preallocate(mode, offset, length)
    elif (host := node.host_file()) is not None:
        await images.workers.run(os.posix_fallocate, host.fd, offset, length)
        await node.flush()


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
            await images.graph.resize(node, size)
            if size > current:
                await _preallocate(images, node, mode, current, size - current)
        except (BlockError, OSError) as error:
            raise ToolError(reason(error)) from error
    say("Image resized.", quiet=args.quiet)
    return 0
